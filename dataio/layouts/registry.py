"""The layouts by name. A file of this folder registers its layout; nothing else has to change."""

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, TypeVar

from dataio.core.errors import UserError
from dataio.layouts.base import Layout

_Class = TypeVar("_Class", bound=Callable[..., Any])


@dataclass(frozen=True)
class LayoutOption:
    """An option that some layouts have, beside `val_fraction` and `skip_unknown`, which all have.

    Attributes:
        name: the keyword of the layout's constructor and of `open_layout`; `--name` on command lines.
        help: one line for `--help`.
        default: None, False or (): the option takes a string, is a switch, or takes several strings.
    """

    name: str
    help: str
    default: bool | tuple[()] | None = None


HALVE_TEST = LayoutOption(
    "halve_test", "val is half of the official test, as in the reference", default=False
)


def _no_labels(path: str) -> tuple[str, int | None] | None:
    return None


@dataclass(frozen=True)
class RegisteredLayout:
    """What is known of a layout without opening it; see `register_layout`."""

    name: str
    factory: Callable[..., Layout]
    options: tuple[LayoutOption, ...]
    val_fraction: float
    labels_of_name: Callable[[str], tuple[str, int | None] | None]
    free_generators: bool
    counting: Literal["", "classes", "files"]
    codec_preset: str


_LAYOUTS: dict[str, RegisteredLayout] = {}


def register_layout(
    name: str,
    *,
    options: tuple[LayoutOption, ...] = (),
    val_fraction: float = 0.10,
    labels_of_name: Callable[[str], tuple[str, int | None] | None] = _no_labels,
    free_generators: bool = False,
    counting: Literal["", "classes", "files"] = "",
    codec_preset: str = "default",
) -> Callable[[_Class], _Class]:
    """Class decorator that adds a layout; the class is called with (source, val_fraction=, skip_unknown=, options).

    Args:
        options: what its constructor takes beside these.
        val_fraction: share of train that becomes val where the user does not say.
        labels_of_name: (generator, object index or None) that a path alone tells, None where it tells
            nothing. The audit compares stored labels with it.
        free_generators: generators may have any name, so the audit compares real and fake only.
        counting: how programs that number classes by counting go wrong on this layout, for the
            audit: "classes" number a folder's photographs by their sorted classes, "files" by the
            order of file names; "" where no such program is known.
        codec_preset: preset that telltale shard takes where the user does not say.
    """

    def register(factory: _Class) -> _Class:
        _LAYOUTS[name] = RegisteredLayout(
            name, factory, options, val_fraction, labels_of_name, free_generators, counting, codec_preset
        )
        return factory

    return register


@cache
def _import_all() -> None:
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        import_module(f"dataio.layouts.{module.name}")


def layout_names() -> tuple[str, ...]:
    """All layouts, sorted."""
    _import_all()
    return tuple(sorted(_LAYOUTS))


def find_layout(name: str) -> RegisteredLayout | None:
    """What is known of a layout; None where there is none of this name."""
    _import_all()
    return _LAYOUTS.get(name)


def layout_options() -> tuple[LayoutOption, ...]:
    """The options of all layouts, each once."""
    return tuple(dict.fromkeys(option for name in layout_names() for option in _LAYOUTS[name].options))


def open_layout(
    name: str,
    source: str | Path,
    *,
    val_fraction: float | None = None,
    skip_unknown: bool = False,
    **options: Any,
) -> Layout:
    """Open a data set.

    Args:
        name: one of `layout_names()`. source: its folder, zip or CSV.
        val_fraction: share of train that becomes val; None is the layout's own default.
        skip_unknown: set files aside that fit no pattern.
        options: see `layout_options()`; an option left at its default may be passed to any layout.

    Raises:
        UserError: no such layout, an option that it does not have; or see the layout.
    """
    layout = find_layout(name)
    if layout is None:
        raise UserError(f"expected one of {', '.join(layout_names())}", field="layout", value=name)
    accepted = {option.name for option in layout.options}
    known = {option.name for option in layout_options()}
    given = {}
    for option, value in options.items():
        if option not in known:
            raise TypeError(f"open_layout has no option {option!r}")
        if value is None or value is False or (isinstance(value, list | tuple) and not value):
            continue
        if option not in accepted:
            raise UserError(f"the {name} layout has no use for it; remove it", field=option)
        given[option] = value
    if val_fraction is not None and not 0 <= val_fraction < 1:
        raise UserError("expected a share in [0, 1)", field="val_fraction", value=val_fraction)
    if given.get("halve_test") and val_fraction is not None:
        raise UserError(
            "train stays whole, so val_fraction has no use; remove one of them", field="halve_test"
        )
    fraction = layout.val_fraction if val_fraction is None else val_fraction
    return layout.factory(source, val_fraction=fraction, skip_unknown=skip_unknown, **given)
