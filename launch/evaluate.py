"""Evaluate a checkpoint on a split: predictions.parquet, metrics.json and a table.

    python launch/evaluate.py --checkpoint RUN/best.pt --data DIR --split test --output OUT
    torchrun --nproc-per-node=8 launch/evaluate.py --checkpoint ...
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from engines.command import Parser, run_command  # noqa: E402
from engines.evaluate import evaluate_checkpoint  # noqa: E402
from engines.metrics import format_table  # noqa: E402
from engines.process import die_with_launcher  # noqa: E402


def main(argv: Sequence[str] | None = None) -> int:
    die_with_launcher()
    parser = Parser(prog="evaluate.py", description="Evaluate a checkpoint on one split of a shard folder.")
    parser.add_argument("--checkpoint", required=True, help="RUN/best.pt or a file of RUN/checkpoints/")
    parser.add_argument("--data", required=True, help="folder written by launch/shard.py")
    parser.add_argument("--split", default="test", help="train, val or test")
    parser.add_argument("--output", required=True, help="folder of the results")
    parser.add_argument("--batch", type=int, default=None, help="images per forward pass")
    parser.add_argument("--verify", action="store_true", help="check every shard's SHA-256 first")
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    metrics = evaluate_checkpoint(
        checkpoint=args.checkpoint,
        data=args.data,
        split=args.split,
        output=args.output,
        batch=args.batch,
        verify=args.verify,
    )
    if metrics is not None:
        print(format_table(metrics))
        print(f"\nresults: {args.output}/metrics.json, {args.output}/predictions.parquet")
    return 0


if __name__ == "__main__":
    run_command(main)
