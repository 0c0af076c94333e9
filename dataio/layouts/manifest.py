"""Any data set, listed in a CSV: path, generator, object[, split, group]."""

from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dataio.core.counter_rng import hash_text
from dataio.core.csv_table import CsvTable, is_utf8
from dataio.core.errors import UserError
from dataio.layouts import cifake, genimage
from dataio.layouts.base import SPLITS, Record
from dataio.layouts.labels import (
    PHOTOGRAPHS,
    Spelling,
    fold_generators,
    fold_objects,
    parse_names,
    tidy,
)
from dataio.layouts.registry import LayoutOption, register_layout
from dataio.layouts.splits import share
from dataio.sources.near_paths import hint_for
from dataio.sources.source import Source

DEFAULT_VAL_FRACTION = 0.10
DEFAULT_TEST_FRACTION = 0.10
_REQUIRED = ("path", "generator", "object")
_OPTIONAL = ("split", "group", "source")


def labels_of_name(path: str) -> tuple[str, int | None] | None:
    """The labels by GenImage's or CIFAKE's names, whose files a list may hold."""
    return genimage.labels_of_name(path) or cifake.labels_of_name(path)


@register_layout(
    "manifest",
    options=(
        LayoutOption("root", "manifest: where its paths start (folder or zip)"),
        LayoutOption("split_from_path", "manifest: splits are the paths' first folders", default=False),
        LayoutOption("real", "manifest: the generators that are photographs, as in 'real,0'"),
    ),
    val_fraction=DEFAULT_VAL_FRACTION,
    labels_of_name=labels_of_name,
    free_generators=True,
)
class ManifestLayout:
    """See `dataio.layouts.base.Layout`.

    Generators are "nature" and the others in sorted order; objects are sorted; an empty
    object is unknown. Photographs are the generators of `real`, or where it is not given those
    that a word for photographs names ("nature", "Real", "photo"). Labels and groups are read in
    one normal form, without invisible characters. Splits: the `split` column; else, with `split_from_path`, a path's
    first folder (train gives val); else a hash of the group, or of the path where there
    is no group, so that no group is in two splits.

    Args:
        source: the CSV. root: the folder (or zip) its paths start in; the CSV's by default.
        val_fraction: share that becomes val. skip_unknown: list missing files in `skipped`.
        split_from_path: see above. field: the argument that named the CSV, for messages.
        real: names with commas between them; see above.

    Raises:
        UserError: what `CsvTable` raises, an unsafe, repeated or missing path, a bad split, a
            group in two splits (the line is named); generators that look alike, or of which
            nothing says whether they are photographs.
    """

    name = "manifest"
    object_in_json = "name"

    def __init__(
        self,
        source: str | Path,
        *,
        root: str | Path | None = None,
        val_fraction: float = DEFAULT_VAL_FRACTION,
        skip_unknown: bool = False,
        split_from_path: bool = False,
        real: str | None = None,
        field: str = "source",
    ) -> None:
        self.field = field
        self.path = Path(source)
        if self.path.is_dir():
            raise UserError(
                "is a folder, expected a CSV file (root names the images' folder)", field=field, value=source
            )
        if not self.path.is_file():
            raise UserError("no such CSV file", field=field, value=source)
        if not split_from_path and val_fraction + DEFAULT_TEST_FRACTION >= 1:
            raise UserError(
                f"with {DEFAULT_TEST_FRACTION} for test this leaves nothing to train on",
                field="val_fraction",
                value=val_fraction,
            )
        self.source = Source(root if root is not None else self.path.parent, "root")
        self.root = str(self.source.path)
        self.val_fraction, self.skip, self.split_from_path = val_fraction, skip_unknown, split_from_path
        self.notes: list[str] = []
        self.skipped: list[tuple[str, str]] = []
        self._table = CsvTable(self.path, required=_REQUIRED, optional=_OPTIONAL, field=field)
        generators, objects = self._check()
        try:
            self._generator, notes = fold_generators(generators, None if real is None else _names(real))
        except ValueError as error:
            raise self._error(str(error)) from None
        self._object, more_notes = fold_objects(objects)
        self.generators = (PHOTOGRAPHS, *sorted({*self._generator.values()} - {PHOTOGRAPHS}))
        self.objects = tuple(sorted({*self._object.values()} - {""}))
        self.notes += [f"{source}: {note}" for note in (*notes, *more_notes)]
        if PHOTOGRAPHS not in self._generator.values():
            self.notes.append(
                f"{source}: no generator is a word for photographs, so there are none; name them with real (--real)"
            )

    def _error(self, text: str) -> UserError:
        return UserError(text, field=self.field, value=self.path)

    def _rows(self) -> Iterator[tuple[int, dict[str, str]]]:
        """Yield (line, fields by column) of each row; the file may be too long to hold."""
        for line, fields in self._table.rows():
            parts = [part for part in fields["path"].split("/") if part not in ("", ".")]
            if not parts or fields["path"].startswith("/") or ".." in parts:
                hint = hint_for(self.source, fields["path"]) if parts and ".." not in parts else ""
                raise self._error(
                    f"line {line}: path is {fields['path']!r}, "
                    "expected one below the root without '..'" + (f"; {hint}" if hint else "")
                )
            fields["path"] = "/".join(parts)  # "./a//b" and "a/b" are one file
            yield line, fields

    def column(self, name: str) -> Iterator[tuple[str, str]]:
        """(path, value) of a column that only some lists have; "" where this one lacks it."""
        for _, row in self._rows():
            yield row["path"], row.get(name, "")

    def _check(self) -> tuple[dict[str, Spelling], dict[str, Spelling]]:
        """Check every row; return the generators and the objects as they are written."""
        generators, objects, paths = dict[str, Spelling](), dict[str, Spelling](), array("Q")
        for line, row in self._rows():
            where = f"line {line}"
            if not row["generator"]:
                raise self._error(f"{where}: generator is empty, expected a name or nature")
            if row.get("split", "") not in ("", *SPLITS):
                raise self._error(f"{where}: split is {row['split']!r}, expected train, val or test")
            for spellings, column in ((generators, "generator"), (objects, "object")):
                text = row[column]
                if text not in spellings:
                    if not is_utf8(text) or "\ufffd" in text:
                        raise self._error(f"{where}: {column} {text!r} is not UTF-8; save the file as UTF-8")
                    spellings[text] = Spelling(line)
                spellings[text].rows += 1
            paths.append(hash_text(row["path"]))
        if not paths:
            raise self._error("has no rows")
        repeated, seen = _repeated(np.frombuffer(paths, np.uint64)), dict[str, int]()
        for line, row in self._rows() if repeated else ():
            path = row["path"]
            if path in seen:
                raise self._error(f"line {line}: path {path!r} is in line {seen[path]} already")
            if hash_text(path) in repeated:
                seen[path] = line
        return generators, objects

    def _split(self, row: dict[str, str]) -> str:
        if row.get("split"):
            return row["split"]
        unique = tidy(row.get("group", "")) or row["path"]
        number = share(unique)
        if self.split_from_path:
            first = row["path"].split("/", 1)[0].lower()
            if first not in SPLITS:
                raise UserError(
                    f"{row['path']!r} does not begin with train/, val/ or test/ (in {self.path})",
                    field="split_from_path",
                )
            return "val" if first == "train" and number < self.val_fraction else first
        if number < self.val_fraction:
            return "val"
        return "test" if number < self.val_fraction + DEFAULT_TEST_FRACTION else "train"

    def records(self) -> Iterator[Record]:
        """See `dataio.layouts.base.Layout.records`."""
        index = {name: number for number, name in enumerate(self.objects)}
        missing, first, first_missing = 0, list[str](), ""
        groups = array("Q")
        self.skipped.clear()
        for line, row in self._rows():
            if not self.source.has(row["path"]):
                if self.skip:
                    self.skipped.append((row["path"], "no such file"))
                else:
                    first_missing = first_missing or row["path"]
                    missing += 1
                    first += [f"{row['path']:.200} (line {line})"] if missing <= 10 else []
                continue
            split, group = self._split(row), tidy(row.get("group", ""))
            if group:
                groups.append(_group_and_split(group, split))
            label = index.get(self._object[row["object"]])
            yield Record(row["path"], self._generator[row["generator"]], label, split, group=group)
        if missing:
            hint = hint_for(self.source, first_missing)
            raise self._error(
                f"{missing} of its files are not under {self.root}; first: {', '.join(first)}. "
                f"{f'{hint}. ' if hint else ''}Give root, or {self._aside}"
            )
        self._check_groups(np.frombuffer(groups, np.uint64))

    @property
    def _aside(self) -> str:
        return (
            "set them aside with skip_unknown (--skip-unknown)"
            if self.field == "source"
            else "remove their lines"
        )

    def _check_groups(self, groups: NDArray[np.uint64]) -> None:
        # Search the lines only where a group has two splits.
        torn, of_group = _repeated(np.unique(groups) // len(SPLITS)), dict[str, str]()
        for line, row in self._rows() if torn else ():
            split, group = self._split(row), tidy(row.get("group", ""))
            if _group_and_split(group, split) // len(SPLITS) not in torn or not self.source.has(row["path"]):
                continue
            if group and of_group.setdefault(group, split) != split:
                raise self._error(
                    f"line {line}: group {group!r} is in {split} and in "
                    f"{of_group[group]}; a group must stay in one split"
                )

    def read(self, path: str) -> bytes:
        return self.source.read(path)


def _names(real: str) -> list[str]:
    try:
        return parse_names(real)
    except ValueError as error:
        raise UserError(str(error), field="real", value=real) from None


def _group_and_split(group: str, split: str) -> int:
    """64 bits that stand for both; divided by the number of splits, for the group."""
    return hash_text(group) // 4 * len(SPLITS) + SPLITS.index(split)


def _repeated(values: NDArray[np.uint64]) -> set[int]:
    ordered = np.sort(values)
    return set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
