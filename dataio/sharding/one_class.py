"""A data set without photographs, or without fakes: nothing can learn or measure real or fake on it."""

from collections.abc import Mapping
from typing import Any

from dataio.core.errors import UserError
from dataio.layouts.base import SPLITS, Layout
from dataio.layouts.registry import find_layout

_SHOWN = 5  # generators that a message names


def require_both_classes(layout: Layout, counts: Mapping[str, int]) -> None:
    """Check that there are photographs and fakes.

    Args:
        counts: images of each generator.

    Raises:
        UserError: one of the two is absent.
    """
    photographs = layout.generators[0]
    found = {name: count for name, count in counts.items() if count}
    if not found or (photographs in found and len(found) > 1):
        return
    names = sorted(found)
    listed = ", ".join(f"{name} ({found[name]})" for name in names[:_SHOWN])
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    registered = find_layout(layout.name)
    decided = registered is not None and any(option.name == "real" for option in registered.options)
    name_them = "say which generator they are with real (--real NAME), " if decided else ""
    what, remedy = ("fakes", "") if photographs in found else ("photographs", name_them)
    raise UserError(
        f"has no {what} among its {sum(found.values())} images, only {listed}{more}; add them, {remedy}or accept "
        "one class with allow_one_class (--allow-one-class)",
        field="source",
        value=getattr(layout, "path", layout.root),  # a list of images is what the user named
    )


def one_class_notes(manifest: Mapping[str, Any]) -> list[str]:
    """A line for each split of a finished folder that has images and no photographs, or no fakes."""
    notes, photographs = [], manifest["generators"][0]
    for split in SPLITS:
        counts = manifest["splits"][split]["generators"]
        real = counts.get(photographs, 0)
        fake = sum(counts.values()) - real
        if (real > 0) == (fake > 0):
            continue
        effect = (
            "telltale train refuses it unless data.allow_one_class is set"
            if split == "train"
            else "real/fake figures on it are null"
        )
        notes.append(f"note: the {split} split has no {'fakes' if real else 'photographs'}; {effect}")
    return notes
