"""GenImage: eight generators' folders, each with its own part of ImageNet's photographs.

Layout: <generator>/[<imagenet_...>/]{train,val}/{ai,nature}/<file>. Classes come from
names alone (see `dataio/layouts/imagenet_classes.csv`), never from counting folders: a
missing class would shift every label behind it.
"""

import csv
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

from dataio.core.errors import UserError, one_line
from dataio.layouts.base import Record
from dataio.layouts.files import Misfits
from dataio.layouts.registry import HALVE_TEST, LayoutOption, register_layout
from dataio.layouts.splits import split_of
from dataio.sources.source import IMAGE_SUFFIXES, Source

GENERATORS = (
    "nature",
    "adm",
    "big_gan",
    "glide",
    "midjourney",
    "stable_diffusion_1_4",
    "stable_diffusion_1_5",
    "vqdm",
    "wukong",
)
# Folder names met in the wild, in lower case without punctuation.
_FOLDERS = {
    "adm": "adm",
    "biggan": "big_gan",
    "glide": "glide",
    "midjourney": "midjourney",
    "stablediffusionv14": "stable_diffusion_1_4",
    "stablediffusion14": "stable_diffusion_1_4",
    "sdv14": "stable_diffusion_1_4",
    "sd14": "stable_diffusion_1_4",
    "stablediffusionv15": "stable_diffusion_1_5",
    "stablediffusion15": "stable_diffusion_1_5",
    "sdv15": "stable_diffusion_1_5",
    "sd15": "stable_diffusion_1_5",
    "vqdm": "vqdm",
    "wukong": "wukong",
}
# The official archives' own folder names, for sources that start there.
_INNER = {
    "imagenetai0508adm": "adm",
    "imagenetai0419biggan": "big_gan",
    "imagenetglide": "glide",
    "imagenetmidjourney": "midjourney",
    "imagenetai0419sdv4": "stable_diffusion_1_4",
    "imagenetai0424sdv5": "stable_diffusion_1_5",
    "imagenetai0419vqdm": "vqdm",
    "imagenetai0424wukong": "wukong",
}
_TOKENS = {
    "adm": "adm",
    "big_gan": "biggan",
    "glide": "glide",
    "midjourney": "midjourney",
    "stable_diffusion_1_4": "sdv4",
    "stable_diffusion_1_5": "sdv5",
    "vqdm": "vqdm",
    "wukong": "wukong",
}
_FAKE = re.compile(r"(?:(?:GLIDE|VQDM)_1000_200_\d+_)?(\d{1,3})_([a-z0-9]+)_(?:image)?(\d+)")
_REAL_TRAIN = re.compile(r"(n\d{8})_\d+")
_REAL_VAL = re.compile(r"ILSVRC2012_val_\d{8}")
# Class and numbers of the 18 files that are broken in the release itself: zero bytes, which
# the archives' checksums confirm. Found by others who decoded all 2.7 million.
_BROKEN = {
    "sdv4": {(33, 134), (33, 137), (33, 152)},
    "biggan": {(116, 81), (116, 94), (116, 98), (116, 107)},
    "midjourney": {(208, 76), (208, 91), (208, 92)},
    "adm": {(115, 135), (115, 141), (115, 142), (115, 154), (115, 156), (115, 164)},
    "sdv5": {(763, 52)},
    "glide": {(808, 33)},
}
DEFAULT_VAL_FRACTION = 0.02
_VAL_IMAGES = 50_000


@lru_cache
def imagenet_classes() -> tuple[dict[str, int], tuple[str, ...]]:
    """The canonical 1,000 classes: {wnid: index 0..999 in sorted-wnid order}, and names."""
    with (files("dataio.layouts") / "imagenet_classes.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {row["wnid"]: int(row["index"]) for row in rows}, tuple(row["name"] for row in rows)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower().removesuffix("_extracted"))


def generator_of_folder(name: str) -> str | None:
    """The generator a folder name stands for, or None."""
    plain = _plain(name)
    return _FOLDERS.get(plain) or _INNER.get(plain)


def is_known_broken(path: str) -> bool:
    """Whether a path has the name of one of the files that GenImage's release has broken."""
    stem = path.rsplit("/", 1)[-1].rpartition(".")[0]
    match = _FAKE.fullmatch(stem)
    return match is not None and (int(match[1]), int(match[3])) in _BROKEN.get(match[2], ())


def labels_of_name(path: str) -> tuple[str, int | None] | None:
    """(generator, class index or None) as a file's name alone gives them; None for other names."""
    stem = path.rsplit("/", 1)[-1].rpartition(".")[0]
    if match := _FAKE.fullmatch(stem):
        generator = next((name for name, token in _TOKENS.items() if token == match[2]), None)
        return (generator, int(match[1])) if generator else None
    if match := _REAL_TRAIN.fullmatch(stem):
        return ("nature", index) if (index := imagenet_classes()[0].get(match[1])) is not None else None
    return ("nature", None) if _REAL_VAL.fullmatch(stem) else None


OPTIONS = (
    LayoutOption("val_labels", "genimage: LOC_val_solution.csv or the devkit's ground truth"),
    LayoutOption("subsets", "genimage: only these generators' folders", default=()),
    HALVE_TEST,
)


@register_layout(
    "genimage",
    options=OPTIONS,
    val_fraction=DEFAULT_VAL_FRACTION,
    labels_of_name=labels_of_name,
    counting="classes",
)
class GenImageLayout:
    """See `dataio.layouts.base.Layout`.

    Args:
        source: the whole data set, or one generator's folder.
        val_labels: Kaggle's LOC_val_solution.csv or the devkit's
            ILSVRC2012_validation_ground_truth.txt; found beside the source where it is
            named so; without it the objects of validation photographs are unknown.
        val_fraction: share of the official train that becomes val; official val is test.
        halve_test: see `split_of`.
        skip_unknown: list files that fit no pattern in `skipped` instead of failing.
        subsets: generators to take the folders of; empty takes all.

    Raises:
        UserError: not this layout, an unknown subset, unreadable labels.
    """

    name = "genimage"
    object_in_json = "index"
    generators: tuple[str, ...] = GENERATORS

    def __init__(
        self,
        source: str | Path,
        *,
        val_labels: str | Path | None = None,
        val_fraction: float = DEFAULT_VAL_FRACTION,
        skip_unknown: bool = False,
        subsets: Sequence[str] = (),
        halve_test: bool = False,
    ) -> None:
        self.source = Source(source)
        self.root = str(source)
        self.val_fraction, self.halve_test = val_fraction, halve_test
        self._wnids, self.objects = imagenet_classes()
        unknown = [name for name in subsets if name not in GENERATORS[1:]]
        if unknown:
            raise UserError(
                f"no generator {unknown[0]!r}; expected some of {', '.join(GENERATORS[1:])}", field="subsets"
            )
        self._subsets = tuple(subsets)
        self._left_out: set[str] = set()  # generators that are there and not in `subsets`
        self._own = generator_of_folder(Path(source).resolve().name)
        self._misfits = Misfits(
            self.name,
            source,
            "<generator>/[imagenet_*/]{train,val}/{ai,nature}/ with names such as "
            "033_sdv4_00134.png or n01440764_18.JPEG",
            skip_unknown,
        )
        self.skipped = self._misfits.skipped
        self.notes: list[str] = []
        self._val_labels = val_labels or self._find_val_labels()
        self._val_objects = read_val_labels(self._val_labels, self._wnids) if self._val_labels else {}

    def _find_val_labels(self) -> Path | None:
        """Look for the ground truth in the source's folder and the one above."""
        here = self.source.path.parent if self.source.is_zip else self.source.path
        for folder in (here, here.parent):
            for name in ("LOC_val_solution.csv", "ILSVRC2012_validation_ground_truth.txt"):
                if (folder / name).is_file():
                    return folder / name
        self.notes.append(
            "no val_labels: the objects of ILSVRC2012_val_* photographs are unknown "
            "(give LOC_val_solution.csv or ILSVRC2012_validation_ground_truth.txt)"
        )
        return None

    def records(self) -> Iterator[Record]:
        """See `dataio.layouts.base.Layout.records`."""
        count = 0
        self._misfits.clear()
        self._left_out.clear()
        for path in self.source.files():
            name = path.rsplit("/", 1)[-1]
            if self._misfits.is_litter(path):
                continue
            record = self._record(path, name)
            if record is not None:
                count += 1
                yield record
        if count == 0 and self._left_out:
            raise UserError(
                f"not in the source {self.root}, which has {', '.join(sorted(self._left_out))}",
                field="subsets",
                value=" ".join(self._subsets),
            )
        self._misfits.check(count)

    def _record(self, path: str, name: str) -> Record | None:
        parts = path.split("/")[:-1]
        if (
            len(parts) < 2
            or parts[-1].lower() not in ("ai", "nature")
            or parts[-2].lower() not in ("train", "val")
        ):
            self._misfits.add(path, "not in {train,val}/{ai,nature}/")
            return None
        kind, part = parts[-1].lower(), parts[-2].lower()
        generator = next((g for p in reversed(parts[:-2]) if (g := generator_of_folder(p))), self._own)
        if generator is None:
            self._misfits.add(path, "in no generator's folder")
            return None
        if self._subsets and generator not in self._subsets:
            self._left_out.add(generator)
            return None
        stem, dot, suffix = name.rpartition(".")
        if f".{suffix.lower()}" not in IMAGE_SUFFIXES or not dot:
            self._misfits.add(path, "not an image's name")
            return None
        fits, label = self._object(kind, generator, stem)
        if not fits:
            self._misfits.add(path, f"not a name of {generator if kind == 'ai' else 'ImageNet'}")
            return None
        if label is None and self._val_labels:
            self._misfits.add(path, f"not listed in {self._val_labels}")
            return None
        split = split_of(stem, part == "val", self.val_fraction, self.halve_test)
        return Record(path, generator if kind == "ai" else "nature", label, split, subset=generator)

    def _object(self, kind: str, generator: str, stem: str) -> tuple[bool, int | None]:
        """Whether the name fits, and the class it gives (None where unknown)."""
        if kind == "ai":
            match = _FAKE.fullmatch(stem)
            fits = match is not None and match[2] == _TOKENS[generator]
            return fits, int(match[1]) if match and fits else None
        if match := _REAL_TRAIN.fullmatch(stem):
            return match[1] in self._wnids, self._wnids.get(match[1])
        if _REAL_VAL.fullmatch(stem):
            return True, self._val_objects.get(stem)
        return False, None

    def read(self, path: str) -> bytes:
        return self.source.read(path)


def read_val_labels(path: str | Path, wnids: dict[str, int]) -> dict[str, int]:
    """{ILSVRC2012_val_00000001: class index} from either form of the ground truth.

    Raises:
        UserError: unreadable, neither form, or the devkit's form without
            ILSVRC2012_mapping.txt ("<ILSVRC2012_ID> <WNID>" a line) beside it.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot be read ({one_line(error)})", field="val_labels", value=path) from None
    if lines and lines[0].replace(" ", "").lower().startswith("imageid,predictionstring"):
        return _read_kaggle(path, lines, wnids)
    if lines and all(line.strip().isdigit() for line in lines):
        return _read_devkit(path, lines, wnids)
    raise UserError(
        "neither Kaggle's LOC_val_solution.csv (ImageId,PredictionString) nor the devkit's "
        "ILSVRC2012_validation_ground_truth.txt (one id per line)",
        field="val_labels",
        value=path,
    )


def _read_kaggle(path: Path, lines: list[str], wnids: dict[str, int]) -> dict[str, int]:
    labels: dict[str, int] = {}
    for number, line in enumerate(lines[1:], 2):
        image, _, prediction = line.partition(",")
        wnid = prediction.split(" ", 1)[0]
        if wnid not in wnids:
            raise UserError(
                f"line {number} has {wnid!r}, expected an ImageNet wnid", field="val_labels", value=path
            )
        if labels.setdefault(image, wnids[wnid]) != wnids[wnid]:
            raise UserError(
                f"line {number} gives {image} another class than a line before; name it once",
                field="val_labels",
                value=path,
            )
    return labels


def _read_devkit(path: Path, lines: list[str], wnids: dict[str, int]) -> dict[str, int]:
    if len(lines) != _VAL_IMAGES:  # the line's number is the image's: one lost shifts the rest
        raise UserError(
            f"{len(lines)} lines, expected {_VAL_IMAGES}; copy it again", field="val_labels", value=path
        )
    mapping_path = path.with_name("ILSVRC2012_mapping.txt")
    try:
        pairs = [line.split() for line in mapping_path.read_text().splitlines() if line.strip()]
        # The devkit numbers synsets too that are no classes; no image has them.
        mapping = {int(pair[0]): wnids[pair[1]] for pair in pairs if pair[1] in wnids}
        return {f"ILSVRC2012_val_{n:08d}": mapping[int(line)] for n, line in enumerate(lines, 1)}
    except FileNotFoundError:
        raise UserError(
            "has the devkit's own ids; put ILSVRC2012_mapping.txt "
            '("<ILSVRC2012_ID> <WNID>" per line) beside it',
            field="val_labels",
            value=path,
        ) from None
    except (OSError, KeyError, ValueError, IndexError) as error:
        raise UserError(
            f"{mapping_path}: does not give each id of {path.name} one of the 1,000 classes' wnids ({error})"
        ) from None
