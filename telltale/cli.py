"""The console script `telltale`: `telltale NAME ...` is `python launch/NAME.py ...`."""

import difflib
import importlib
import sys
from collections.abc import Sequence
from functools import partial

from dataio.core.errors import UserError
from engines.runtime.command import run_command

# Group: command: (module of launch, one line of help).
COMMANDS: dict[str, dict[str, tuple[str, str]]] = {
    "Data": {
        "shard": ("shard", "turn a data set into WebDataset shards, or verify them"),
        "audit": ("audit", "how far a classifier gets without the picture's content"),
        "make-vqa": ("make_vqa", "make finetuning conversations and benchmarks from labeled images"),
    },
    "Detector": {
        "train": ("train", "train a dual-head detector, on all GPUs of this machine"),
        "evaluate": ("evaluate", "evaluate a checkpoint on a split of a shard folder"),
        "calibrate": ("calibrate", "calibrate a checkpoint and freeze its decision threshold"),
        "predict": ("predict", "predict images: real, AI-generated or unsure"),
        "explain": ("explain", "explain images: verdict, Grad-CAM, a language model's words"),
        "export": ("export", "export a checkpoint as safetensors, ONNX or TinyLLaVA"),
    },
    "Experiments": {
        "compare": ("compare", "compare two evaluations of the same images"),
        "report": ("report", "write the report of an evaluation again"),
        "protocol": ("protocol", "robustness, aligned views, cross-generator, leave-one-out"),
        "grid": ("grid", "train and evaluate every combination of a sweep file"),
        "wandb": ("wandb_sync", "make Weights & Biases' copy of runs again"),
    },
    "Language model": {
        "finetune": ("finetune_mlm", "finetune TinyLLaVA under DeepSpeed"),
        "evaluate-mlm": ("evaluate_mlm", "measure a finetuned TinyLLaVA on a benchmark"),
        "finetune-memory": ("finetune_memory", "estimate the memory that finetuning needs"),
    },
    "Cluster": {
        "submit": ("submit", "submit a configuration to Slurm"),
        "preflight": ("preflight", "check a job's nodes before training"),
    },
    "Measurements": {
        "benchmark": ("benchmark", "measure telltale and common alternatives"),
    },
}
# These start a process for each GPU, unless a launcher has started this process.
_LAUNCHERS = ("train", "finetune")


def help_text() -> str:
    """All commands, one line each, by group."""
    lines = ["usage: telltale COMMAND [options]", "", "telltale COMMAND --help explains a command.", ""]
    for group, commands in COMMANDS.items():
        lines += [f"{group}:", *(f"  {name:<16} {text}" for name, (_, text) in commands.items()), ""]
    return "\n".join(lines).rstrip()


def find_module(command: str) -> str:
    """The module of launch/ that is behind a command; also under its file's name (make_vqa).

    Raises:
        UserError: no such command; names the nearest ones.
    """
    modules = {name: module for group in COMMANDS.values() for name, (module, _) in group.items()}
    by_file = {module: module for module in modules.values()}
    known = {**by_file, **modules}
    if command not in known:
        close = difflib.get_close_matches(command, modules, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise UserError(f"{command}: no such command{hint} (see telltale --help)")
    return known[command]


def _dispatch(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0
    if argv[0] in ("-V", "--version"):
        from importlib.metadata import version

        print(f"telltale {version('telltale')}")
        return 0
    name = find_module(argv[0])
    module = importlib.import_module(f"launch.{name}")
    options = {"gpus": "all"} if argv[0] in _LAUNCHERS else {}
    code: int = module.main(list(argv[1:]), **options)
    return code


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command and leave with its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    # At once: DeepSpeed's threads may abort the process at the interpreter's end.
    run_command(partial(_dispatch, words), at_once=words[:1] == ["finetune"])


if __name__ == "__main__":
    main()
