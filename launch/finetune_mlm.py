"""Finetune TinyLLaVA under DeepSpeed ZeRO to say why an image is fake.

    telltale finetune
    telltale finetune --gpus 4 --config configs/tinyllava_lora_zero2.yaml --optim.lr 1e-4
    deepspeed --num_gpus 4 launch/finetune_mlm.py --config configs/tinyllava_lora_zero2.yaml
    telltale finetune --dry-run --nodes 2 --gpus 8 --config configs/tinyllava_full_zero3.yaml

Without --config it runs configs/tinyllava_quickstart.yaml: a tiny random model on
conversations that it makes itself. deepspeed, torchrun and python start it too. The same
command continues a run that was stopped or killed. Exit codes: 0 finished; 2 user error
(one line); 75 stopped and saved, run again to continue.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from engines.config.parser import Parser
from engines.runtime.command import is_main_process, run_command
from engines.runtime.paths import CONFIGS
from launch.shared.ranks import RunCommand, command_line, run_or_launch

if TYPE_CHECKING:
    from engines.runtime.machine import Machine


def _kind() -> type:
    from engines.config.mlm import FinetuneConfig

    return FinetuneConfig


def _run(config: Any) -> int:
    if is_main_process():
        print(f"{config.run.dir}: loading DeepSpeed and transformers", flush=True)
    from engines.mlm.finetune import run_finetuning

    return run_finetuning(config)


def _plan(config: Any, machine: "Machine", rate: float | None) -> str:
    from engines.mlm.dry_run import plan_finetuning

    return plan_finetuning(config, machine, rate)


COMMAND = RunCommand(
    name="finetune",
    doc=__doc__,
    script=Path(__file__),
    default_config=CONFIGS / "tinyllava_quickstart.yaml",
    kind=_kind,
    run=_run,
    plan=_plan,
    fits=lambda config, n: n <= config.train.global_batch,
)


def make_parser() -> Parser:
    return COMMAND.make_parser()


def main(argv: Sequence[str] | None = None, *, gpus: str | None = None) -> int:
    """Finetune; `gpus` is the default of --gpus, None for this process alone."""
    return run_or_launch(COMMAND, command_line(argv), gpus)


if __name__ == "__main__":
    # DeepSpeed's and gloo's threads abort some processes ("terminate called without an active
    # exception") at the interpreter's end; torchrun then counts a finished run as failed.
    run_command(main, at_once=True)
