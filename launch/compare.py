r"""Compare two evaluations of the same images.

    telltale compare runs/a/evaluation runs/b/evaluation --output comparison.json

Takes folders written by telltale evaluate, or their predictions.parquet. Prints paired
differences (in points, with 95 % intervals) and McNemar's test, overall and for each
generator, and the sentences that may honestly be written.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from engines.config.parser import Parser
from engines.runtime.command import run_command


def make_parser() -> Parser:
    parser = Parser("compare", __doc__)
    parser.add_argument("a", metavar="EVAL_A", help="folder with predictions.parquet, or the file")
    parser.add_argument("b", metavar="EVAL_B", help="the same of the other detector")
    parser.add_argument("--output", default=None, help="FILE.json for the comparison")
    parser.add_argument("--resamples", type=int, default=2000, help="of the bootstrap")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser()
    options = parser.parse_args(argv)
    if options.resamples < 1:
        parser.error(f"--resamples is {options.resamples}, expected at least 1")
    if options.seed < 0:
        parser.error(f"--seed is {options.seed}, expected 0 or more")

    from engines.evaluate.compare import compare_evaluations, format_comparison

    comparison = compare_evaluations(
        options.a, options.b, output=options.output, resamples=options.resamples, seed=options.seed
    )
    print(format_comparison(comparison))
    if options.output is not None:
        print(f"\nresults: {options.output}")
    return 0


if __name__ == "__main__":
    run_command(main)
