"""The flags that describe a data set's layout, shared by the commands that read one."""

from typing import Any

from dataio.layouts import NAMES, open_layout
from dataio.layouts.base import Layout
from engines.config.parser import Parser

# How `open_layout` calls what the flags say.
KEYS = (
    "val_labels",
    "root",
    "val_fraction",
    "skip_unknown",
    "subsets",
    "split_from_path",
    "halve_test",
)


def add_layout_flags(parser: Parser, *, required: bool, skipped: str) -> None:
    """Add --layout, --source and what belongs to single layouts.

    Args:
        required: whether --layout and --source must be given. skipped: what becomes of files that
            fit no pattern, in words.
    """
    add = parser.add_argument
    add("--layout", choices=NAMES, required=required, help="how the source is laid out")
    add(
        "--source", required=required, help="folder, zip or CSV; shard.py draws a synthetic one where missing"
    )
    add("--val-labels", default=None, help="genimage: LOC_val_solution.csv or the devkit's ground truth")
    add("--root", default=None, help="manifest: where its paths start (folder or zip)")
    add("--split-from-path", action="store_true", help="manifest: splits are the paths' first folders")
    add("--val-fraction", type=float, default=None, help="share of train that becomes val")
    add("--halve-test", action="store_true", help="val is half of the official test, as in the reference")
    add("--subsets", nargs="*", default=[], help="genimage: only these generators' folders")
    add("--skip-unknown", action="store_true", help=skipped)


def layout_of(args: Any) -> Layout:
    """Open the layout that parsed flags describe.

    Raises:
        UserError: what `open_layout` raises.
    """
    return open_layout(args.layout, args.source, **{key: args[key] for key in KEYS})
