"""Data sets on disk as streams of records: genimage, cifake, manifest, synthetic."""

from collections.abc import Sequence
from pathlib import Path

from dataio.core.errors import UserError
from dataio.layouts import cifake, genimage, manifest, synthetic
from dataio.layouts.base import Layout

NAMES = ("genimage", "cifake", "manifest", "synthetic")


def open_layout(
    name: str,
    source: str | Path,
    *,
    val_labels: str | Path | None = None,
    root: str | Path | None = None,
    val_fraction: float | None = None,
    skip_unknown: bool = False,
    subsets: Sequence[str] = (),
    split_from_path: bool = False,
    halve_test: bool = False,
) -> Layout:
    """Open a data set.

    Args:
        name: one of NAMES. source: its folder, zip or CSV.
        val_labels: genimage's ground truth of ImageNet's validation photographs.
        root: where a manifest's paths start.
        val_fraction: share of train that becomes val; None is the layout's own default.
        skip_unknown: set files aside that fit no pattern.
        subsets: genimage's generator folders to take; empty takes all.
        split_from_path: a manifest's splits are its paths' first folders.
        halve_test: val is half of the official test, train stays whole (not for a manifest).

    Raises:
        UserError: no such layout, an option it does not have, or see the layout.
    """
    if name not in NAMES:
        raise UserError(f"--layout {name}: expected one of {', '.join(NAMES)}")
    is_genimage = name in ("genimage", "synthetic")
    for flag, given, fits in (
        ("--val-labels", val_labels is not None, is_genimage),
        ("--subsets", bool(subsets), is_genimage),
        ("--root", root is not None, name == "manifest"),
        ("--split-from-path", split_from_path, name == "manifest"),
        ("--halve-test", halve_test, name != "manifest"),
    ):
        if given and not fits:
            raise UserError(f"{flag}: the {name} layout has no use for it; remove it")
    if val_fraction is not None and not 0 <= val_fraction < 1:
        raise UserError(f"--val-fraction {val_fraction}: expected a share in [0, 1)")
    if halve_test and val_fraction is not None:
        raise UserError("--halve-test: leaves train whole, so --val-fraction has no use; remove one of them")
    if name == "cifake":
        return cifake.CifakeLayout(
            source,
            val_fraction=_or(val_fraction, cifake.DEFAULT_VAL_FRACTION),
            skip_unknown=skip_unknown,
            halve_test=halve_test,
        )
    if name == "manifest":
        return manifest.ManifestLayout(
            source,
            root=root,
            val_fraction=_or(val_fraction, manifest.DEFAULT_VAL_FRACTION),
            skip_unknown=skip_unknown,
            split_from_path=split_from_path,
        )
    layout = genimage.GenImageLayout if name == "genimage" else synthetic.SyntheticLayout
    default = genimage.DEFAULT_VAL_FRACTION if name == "genimage" else synthetic.DEFAULT_VAL_FRACTION
    return layout(
        source,
        val_labels=val_labels,
        val_fraction=_or(val_fraction, default),
        skip_unknown=skip_unknown,
        subsets=subsets,
        halve_test=halve_test,
    )


def _or(given: float | None, default: float) -> float:
    return default if given is None else given
