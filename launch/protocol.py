r"""Run a protocol: robustness, aligned views, the cross-generator matrix, or leave-one-out.

    telltale protocol configs/protocols/robustness.yaml --output runs/NAME/robustness \
        --checkpoint runs/NAME/best.pt --layout genimage --source GenImage --val-labels LOC_val_solution.csv
    telltale protocol configs/protocols/cross_generator.yaml --output runs/cross --shards data/genimage

Killed at any moment and run again, it continues: each finished cell has its own result. On a
cluster, the same command with --task i/n does each n-th cell; then --finish merges.

    sbatch --array=0-7 ... telltale protocol ... --task $SLURM_ARRAY_TASK_ID/8
    telltale protocol ... --finish

Writes protocol.json and protocol.md into the output folder and prints the table. Dotted flags go
to `telltale train` in every training of cross_generator and leave_one_out.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from engines.config.parser import Parser
from engines.config.protocol import make_protocol_parser, parse_command
from engines.runtime.command import run_command


def make_parser() -> Parser:
    return make_protocol_parser(__doc__)


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if "--help" in words or "-h" in words:
        make_parser().parse_args(["--help"])
    command = parse_command(words)
    from engines.experiments.protocol import run_protocol

    print(run_protocol(command))
    return 0


if __name__ == "__main__":
    run_command(main)
