"""Train a dual-head detector of generated images.

    telltale train
    telltale train --gpus 2 --config configs/resnet18_cifake.yaml --optim.lr 0.05
    torchrun --nproc-per-node=2 launch/train.py --config configs/resnet18_cifake.yaml
    telltale train --dry-run --nodes 4 --gpus 8 --config configs/resnet50_genimage_4096.yaml

Without --config it runs configs/quickstart.yaml and draws its data on first use. The same
command continues a run that was stopped or killed, bit for bit. Exit codes: 0 finished;
2 user error (one line); 75 stopped and saved, run again to continue.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from engines.config.parser import Parser
from engines.runtime.command import run_command
from engines.runtime.paths import CONFIGS
from launch.shared.ranks import RunCommand, command_line, run_or_launch

if TYPE_CHECKING:
    from engines.runtime.machine import Machine


def _kind() -> type:
    from engines.config.detector import Config

    return Config


def _run(config: Any) -> int:
    from engines.train.loop import run_training

    return run_training(config)


def _plan(config: Any, machine: "Machine", rate: float | None) -> str:
    from engines.train.dry_run import plan_training

    return plan_training(config, machine, rate)


COMMAND = RunCommand(
    name="train",
    doc=__doc__,
    script=Path(__file__),
    default_config=CONFIGS / "quickstart.yaml",
    kind=_kind,
    run=_run,
    plan=_plan,
    fits=lambda config, n: n <= config.train.global_batch // config.train.micro_batch,
    sweep=True,
)


def make_parser() -> Parser:
    return COMMAND.make_parser()


def main(argv: Sequence[str] | None = None, *, gpus: str | None = None) -> int:
    """Train; `gpus` is the default of --gpus, None for this process alone."""
    return run_or_launch(COMMAND, command_line(argv), gpus)


if __name__ == "__main__":
    run_command(main, within=60)
