r"""Train and evaluate every combination of a sweep file on this machine, and print one table.

    telltale grid configs/reference/cifake_grid.yaml --output runs/reference_cifake \
        --data.shards data/cifake --train.epochs 2

The file is in Weights & Biases' sweep format (method: grid), so `wandb sweep` takes it too;
this command needs no account. Flags it does not know go to telltale train in every run.
Killed and started again, it skips what is finished.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from dataio.core.errors import UserError, writing
from engines.config.parser import Parser, split_known_flags
from engines.runtime.command import run_command


def make_parser() -> Parser:
    parser = Parser("grid", __doc__)
    add = parser.add_argument_group("Runs").add_argument
    add("sweep", help="YAML in W&B's sweep format with method: grid, see configs/sweeps/")
    add("--output", required=True, help="folder of the runs and of grid.csv")
    add("--processes", type=int, default=1, help="processes of each run")
    add = parser.add_argument_group("Evaluation").add_argument
    add("--split", default="test", help="split that is evaluated")
    add("--weights", choices=["best", "last"], default="best", help="which weights of a run")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    command_words, flags = split_known_flags(words)
    parser = make_parser()
    options = parser.parse_args(command_words)

    from engines.experiments.grid import format_grid, read_grid, run_grid

    if options.processes < 1:
        parser.error(f"--processes is {options.processes}, expected at least 1")
    combinations = read_grid(options.sweep)
    output = Path(options.output)
    with writing(output, field="output", hint="choose another folder"):
        output.mkdir(parents=True, exist_ok=True)
    rows = run_grid(
        combinations,
        output,
        flags,
        processes=options.processes,
        split=options.split,
        weights=options.weights,
    )
    print(format_grid(rows, options.split))
    print(f"\nresults: {output / 'grid.csv'}")
    failed = [row["name"] for row in rows if row["failure"]]
    if failed:
        raise UserError(f"{len(failed)} of {len(rows)} runs failed, {failed[0]} first; see the table")
    return 0


if __name__ == "__main__":
    run_command(main)
