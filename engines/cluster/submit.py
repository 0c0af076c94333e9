"""From a configuration to an sbatch command.

Slurm needs some values before it allocates, and `#SBATCH` lines expand no variables; a site's own
values therefore come from options or from slurm/site.env.
"""

import contextlib
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from dataio.core.errors import UserError, one_line
from engines.runtime.paths import find_config

SITE = "slurm/site.env"
DETECTOR, FINETUNE = "slurm/train_resnet50.sh", "slurm/finetune_tinyllava.sh"
SCRIPTS = {DETECTOR: "launch/train.py", FINETUNE: "launch/finetune_mlm.py"}
# Keys that only a finetuning run has.
_FINETUNE_KEYS = frozenset(["tune", "deepspeed"])
_NAMES = ("time", "partition", "account", "qos", "constraint")


@dataclass(frozen=True)
class Request:
    """The options of a job; None leaves a value to slurm/site.env or the script."""

    experiment: str
    nodes: int = 1
    gpus: int | None = None
    cpus: int | None = None
    mem: str | None = None
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    sbatch: str = ""
    flags: tuple[str, ...] = ()


def read_site(root: Path) -> dict[str, str]:
    """Variables that slurm/site.env sets, as bash reads it; the environment's own value wins.

    Raises:
        UserError: bash cannot read the file.
    """
    file = Path(os.environ.get("TELLTALE_SITE", root / SITE))
    if not file.is_file():
        if "TELLTALE_SITE" in os.environ:
            raise UserError(f"TELLTALE_SITE={file}: no such file; name a copy of slurm/site.env.example")
        return {}
    script = 'set -aeu; source "$1" >&2; env -0'
    done = subprocess.run(
        ["bash", "-c", script, "bash", str(file)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise UserError(f"{file}: bash cannot read it ({' '.join(done.stderr.split())[:200]}); correct it")
    variables = dict(entry.partition("=")[::2] for entry in done.stdout.split("\0") if entry)
    ours = re.compile("TELLTALE_|SBATCH_|NCCL_|GLOO_|WANDB_|HF_")
    return {key: value for key, value in variables.items() if key not in os.environ and ours.match(key)}


def script_of(experiment: str) -> str:
    """The batch script for a configuration.

    Raises:
        UserError: no such file, or not a configuration.
    """
    try:
        loaded = yaml.safe_load(find_config(experiment).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(
            f"{experiment}: cannot be read as YAML ({one_line(error)[:200]}); give a file such as "
            "configs/resnet50_genimage.yaml"
        ) from None
    if not isinstance(loaded, dict) or "run" not in loaded:
        raise UserError(f"{experiment}: not an experiment's configuration (no run.dir); see configs/")
    return FINETUNE if _FINETUNE_KEYS & loaded.keys() else DETECTOR


def check_flags(request: Request) -> str:
    """Parse the training's command as the job will; returns its run folder.

    Raises:
        UserError: an unknown key, or a value out of range.
    """
    from engines.config.detector import Config
    from engines.config.mlm import FinetuneConfig
    from engines.config.parser import parse_as

    script = script_of(request.experiment)
    if script == DETECTOR:
        return parse_as(Config, request.flags, request.experiment).run.dir
    return parse_as(FinetuneConfig, request.flags, request.experiment).run.dir


def command_of(request: Request, root: Path, gres: str = "") -> list[str]:
    """The sbatch command.

    Args:
        gres: TELLTALE_GRES: the name of GPUs for --gres, where Slurm has no --gpus-per-node.

    Raises:
        UserError: a value out of range, or a configuration or flag that would fail in the job.
    """
    if request.nodes < 1:
        raise UserError("expected 1 or more", field="nodes", value=request.nodes)
    if request.gpus is not None and request.gpus < 1:
        raise UserError("expected 1 or more; leave it out for a whole node", field="gpus", value=request.gpus)
    for name in ("cpus", "mem"):
        if getattr(request, name) is not None and request.gpus is None:
            raise UserError("only with gpus; without them the job has the whole node", field=name)
    check_flags(request)
    script = root / script_of(request.experiment)
    if not script.is_file():
        raise UserError(
            f"{script}: not found; submit from a checkout of telltale, which has the batch scripts"
        )
    words = ["sbatch", f"--nodes={request.nodes}"]
    for name in _NAMES:
        if (value := getattr(request, name)) is not None:
            words.append(f"--{name}={value}")
    if request.gpus is not None:
        # Later options win over the script's --exclusive and --mem=0.
        gpus = f"--gres={gres}:{request.gpus}" if gres else f"--gpus-per-node={request.gpus}"
        words += ["--oversubscribe", gpus]
        words += [f"--cpus-per-task={request.cpus or 8 * request.gpus}", f"--mem={request.mem or '64G'}"]
    words += shlex.split(request.sbatch)
    file = find_config(request.experiment).resolve()
    config = str(file.relative_to(root)) if file.is_relative_to(root) else str(file)
    return [*words, str(script), "--config", config, *request.flags]


def check_weights(request: Request, root: Path) -> None:
    """Check that a detector's initial weights are on this machine, the login node.

    Raises:
        UserError: they are not; with the command that fetches them.
    """
    from engines.config.detector import Config
    from engines.config.parser import parse_as
    from engines.train.initial_weights import weights_files

    file = find_config(request.experiment).resolve()
    if script_of(str(file)) == DETECTOR:
        with contextlib.chdir(root):
            weights_files(parse_as(Config, request.flags, file))


def plan_job(
    request: Request, root: Path, node_gpus: int, rate: float | None, gpu_memory: float | None
) -> str:
    """What the job would do, and what the checks before its first step say; nothing is written.

    Args:
        root: the checkout, in which jobs run. node_gpus: GPUs of a whole node, where `request` names none; 0 for none.
        rate: images or conversations per second of a GPU. gpu_memory: of a GPU, GiB.

    Raises:
        UserError: a value that is not above 0; what the job would end with.
    """
    from engines.config.detector import Config
    from engines.config.mlm import FinetuneConfig
    from engines.config.parser import parse_as
    from engines.runtime.machine import Machine

    if node_gpus < 0:
        raise UserError("expected 0 or more", field="node_gpus", value=node_gpus)
    for name, value in (("rate", rate), ("gpu_memory", gpu_memory)):
        if value is not None and not value > 0:
            raise UserError("expected more than 0", field=name, value=value)
    memory = None if gpu_memory is None else gpu_memory * 2**30
    gpus = request.gpus or node_gpus
    machine = Machine(request.nodes, max(1, gpus), gpus > 0, memory)
    file = find_config(request.experiment).resolve()
    check_weights(request, root)
    with contextlib.chdir(root):
        if script_of(str(file)) == DETECTOR:
            from engines.train.dry_run import plan_training

            return plan_training(parse_as(Config, request.flags, file), machine, rate)
        from engines.mlm.dry_run import plan_finetuning  # imports transformers

        return plan_finetuning(parse_as(FinetuneConfig, request.flags, file), machine, rate)


def explain(command: Sequence[str], site: Mapping[str, str]) -> str:
    """The command line, with the variables that site.env adds."""
    return " ".join([*(f"{key}={shlex.quote(value)}" for key, value in site.items()), shlex.join(command)])


def submit(command: Sequence[str], request: Request, root: Path, site: Mapping[str, str]) -> str:
    """Submit the job; returns commands to follow the run.

    Raises:
        UserError: Slurm is not installed, or refuses the job; see also `check_weights`.
    """
    if shutil.which("sbatch") is None:
        script = SCRIPTS[script_of(request.experiment)]
        raise UserError(
            "sbatch: not found, this machine has no Slurm; run it on a cluster's login node, or train here with: "
            f"torchrun --nproc-per-node=gpu {script} --config {request.experiment} {shlex.join(request.flags)}".rstrip()
        )
    check_weights(request, root)
    done = subprocess.run(
        [*command[:1], "--parsable", *command[1:]],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **site},
    )
    if done.returncode != 0:
        raise UserError(
            f"sbatch refused the job: {one_line(done.stderr)}; correct the options or slurm/site.env. The "
            f"command was: {shlex.join(command)}"
        )
    job = done.stdout.strip().partition(";")[0]
    run = root / check_flags(request)
    name = "telltale-train" if script_of(request.experiment) == DETECTOR else "telltale-finetune"
    lines = {
        "job": f"{job} ({run})",
        "follow": f"tail -F {name}-{job}.out",
        "state": f"squeue -j {job}",
        "metrics": f"tail -F {run}/metrics.jsonl",
        "pause": f"touch {run}/stop            # it saves and ends; the same command continues",
        "requeue": f"scancel --batch --signal=USR1 {job}   # it saves, is requeued and continues",
        "cancel": f"scancel {job}",
        "outcome": f"cat {run}/exit.json",
    }
    return "\n".join(f"{key + ':':9}{value}" for key, value in lines.items())
