"""Make Weights & Biases' copy of runs again, from the runs' own folders.

    telltale wandb sync runs/quickstart
    telltale wandb sync runs/* --mode offline

For runs that were trained with `--log.wandb off`, without a network, or while Weights & Biases failed.
Reads config.yaml, metrics.jsonl and images/. A run folder has one id (its wandb.json), and what Weights & Biases
has of that run is replaced: the same command again changes nothing. Offline, it writes RUN/wandb-sync and
prints the `wandb sync` command that uploads it.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from dataio.core.errors import UserError
from engines.config.parser import Parser
from engines.runtime.command import run_command


def make_parser() -> Parser:
    parser = Parser("wandb", __doc__)
    parser.add_argument("action", choices=["sync"], help="what to do")
    parser.add_argument("runs", metavar="RUN", nargs="+", help="folders of training or finetuning runs")
    parser.add_argument(
        "--mode",
        choices=["auto", "online", "offline"],
        default="auto",
        help="auto is WANDB_MODE's, else online where a key is configured, else offline",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    options = make_parser().parse_args(argv)

    from engines.runtime.wandb_rebuild import rebuild_run

    failures = []
    for run in options.runs:
        try:
            made = rebuild_run(Path(run), options.mode)
        except UserError as error:  # the others are sent nevertheless
            failures.append(error.for_command_line())
            continue
        print(f"{run}: run {made.id}, {made.rows} lines of metrics")
        if made.offline is not None:
            print(f"to upload it: wandb sync {made.offline}")
    for failure in failures[1:]:
        print(f"error: {failure}", file=sys.stderr)
    if failures:
        raise UserError(failures[0])
    return 0


if __name__ == "__main__":
    run_command(main)
