r"""Ask how far a detector gets without looking at the picture, before you train one.

    telltale audit --layout genimage --source GenImage --val-labels LOC_val_solution.csv --output audit.json
    telltale audit --shards data/genimage

Small classifiers are asked to tell fakes from photographs by the file's container, then by
trivial pixel statistics. The verdict is pass, warn or fail. That of shards goes beside their
manifest, where telltale train reads it.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from dataio.core.errors import UserError
from dataio.layouts.base import SPLITS
from engines.config.layout_flags import add_layout_flags, layout_keys, layout_of
from engines.config.parser import Parser
from engines.runtime.command import run_command


def make_parser() -> Parser:
    parser = Parser("audit", __doc__)
    add_layout_flags(parser, required=False, skipped="leave out files that fit no pattern")
    add = parser.add_argument_group("Audit").add_argument
    add("--shards", default=None, help="folder written by telltale shard")
    add("--output", default=None, help="JSON file; of shards by default audit.json beside their manifest")
    add("--split", nargs="*", default=list(SPLITS), help="train, val, test; all by default")
    add("--sample", type=int, default=4000, help="images to look at, spread over the generators; 0: all")
    add("--seed", type=int, default=0, help="of the sample, the folds and the intervals")
    add("--workers", type=int, help="processes (default: the cores); the result does not depend on it")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)

    from dataio.core.cores import worker_count
    from engines.audit.audit import AuditSettings, check_audit_path, run_audit
    from engines.audit.verdict import format_audit

    settings = AuditSettings(
        sample=args.sample,
        seed=args.seed,
        splits=args.split,
        workers=worker_count(args.workers),
    )
    if args.shards is not None:
        misplaced = [key for key in ("layout", "source", *layout_keys()) if args[key]]
        if misplaced:
            raise UserError(
                f"--{misplaced[0].replace('_', '-')}: has no use with --shards; remove one of them"
            )
        audit, output = run_audit(args.shards, settings, args.output)
    else:
        for flag in ("layout", "source", "output"):
            if args[flag] is None:
                raise UserError(f"--{flag}: missing; give --layout, --source and --output, or --shards")
        check_audit_path(args.output)
        layout = layout_of(args)
        for note in layout.notes:
            print(f"note: {note}", file=sys.stderr)
        audit, output = run_audit(layout, settings, args.output)
    print(f"audit of {args.shards or args.source}")
    print(format_audit(audit))
    print(f"\nwritten: {output}")
    return 0


if __name__ == "__main__":
    run_command(main)
