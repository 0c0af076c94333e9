r"""Run a protocol: robustness, aligned views, the cross-generator matrix, or leave-one-out.

    python launch/protocol.py configs/protocols/robustness.yaml --output runs/NAME/robustness \
        --checkpoint runs/NAME/best.pt --layout genimage --source GenImage --val-labels LOC_val_solution.csv
    python launch/protocol.py configs/protocols/cross_generator.yaml --output runs/cross --shards data/genimage

Killed at any moment and run again, it continues: each finished cell has its own result. On a
cluster, the same command with --task i/n does each n-th cell; then --finish merges:

    sbatch --array=0-7 ...  python launch/protocol.py ... --task $SLURM_ARRAY_TASK_ID/8
    python launch/protocol.py ... --finish

Writes protocol.json and protocol.md into the output folder and prints the table.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from engines.config.protocol import parse_command
from engines.experiments.protocol import run_protocol
from engines.runtime.command import run_command


def main(argv: Sequence[str] | None = None) -> int:
    print(run_protocol(parse_command(list(sys.argv[1:] if argv is None else argv))))
    return 0


if __name__ == "__main__":
    run_command(main)
