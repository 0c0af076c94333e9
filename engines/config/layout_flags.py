"""The flags that describe a data set's layout, shared by the commands that read one."""

from typing import Any

from dataio.layouts import Layout, open_layout
from dataio.layouts.registry import find_layout, layout_names, layout_options
from engines.config.parser import Parser

_PATHS = ("val_labels", "root")  # may move between runs: not among the settings of a shard folder


def layout_keys() -> tuple[str, ...]:
    """The arguments of `open_layout` that have a flag, but for the layout and the source."""
    return ("val_fraction", "skip_unknown", *(option.name for option in layout_options()))


def add_layout_flags(parser: Parser, *, required: bool, skipped: str) -> None:
    """Add --layout, --source and what belongs to single layouts.

    Args:
        required: whether --layout and --source must be given. skipped: what becomes of files that
            fit no pattern, in words.
    """
    add = parser.add_argument_group("Data set").add_argument
    add("--layout", choices=layout_names(), required=required, help="how the source is laid out")
    add("--source", required=required, help="folder, zip or CSV; synthetic: drawn where missing")
    for option in layout_options():
        flag = f"--{option.name.replace('_', '-')}"
        if option.default is False:
            add(flag, action="store_true", help=option.help)
        elif option.default == ():
            add(flag, nargs="*", default=[], help=option.help)
        else:
            add(flag, default=None, help=option.help)
    add("--val-fraction", type=float, default=None, help="share of train that becomes val")
    add("--skip-unknown", action="store_true", help=skipped)


def layout_of(args: Any) -> Layout:
    """Open the layout that parsed flags describe.

    Raises:
        UserError: what `open_layout` raises.
    """
    return open_layout(args.layout, args.source, **{key: args[key] for key in layout_keys()})


def layout_settings(args: Any) -> dict[str, Any]:
    """The flags that the bytes of a shard folder depend on."""
    settings = {key: args[key] for key in ("val_fraction", "subsets", "skip_unknown", "split_from_path")}
    for option in layout_options():
        if option.name not in (*settings, *_PATHS):
            settings[option.name] = args[option.name] or None  # absent from older folders
    return settings


def default_codec_preset(layout: str) -> str:
    """The preset of `--codec.preset` for a layout where the user names none."""
    registered = find_layout(layout)
    return registered.codec_preset if registered else "default"
