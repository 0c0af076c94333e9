"""How far one gets without looking at the picture: probes, duplicates, balance, order, a verdict.

A container leak is a fail, since a detector can then be perfect and know nothing of
pictures. A leak in trivial pixel statistics is a warn: it may be a resize factor or a JPEG
history that differs, or what the generators themselves do. What cannot be said for lack of
images is a warn too, never a pass in silence.
"""

import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from dataio.core.atomic import write_text
from dataio.core.errors import UserError
from dataio.core.progress import ProgressBar
from dataio.layouts.base import SPLITS, Layout
from dataio.layouts.manifest import ManifestLayout
from dataio.sharding.duplicates import FINGERPRINT, Pairs, exact_pairs, near_pairs
from dataio.shards.manifest import read_manifest, sha256_of
from engines.audit.gate import FORMAT, VERSION
from engines.audit.label_order import CountedLabels, check_mixed, compare_with_names
from engines.audit.probes import (
    BARS,
    FOLDS,
    PROBE_RESAMPLES,
    Data,
    leaks,
    probe,
    probe_families,
    single_features,
)
from engines.audit.sample import (
    AuditedImage,
    SampleRef,
    StratifiedSampler,
    audit_images,
    balance,
    open_splits,
    refs_of_layout,
    refs_of_shards,
    stack,
)
from engines.audit.verdict import add_verdict

_LISTED = 20  # unreadable images and pairs of each kind in the JSON


@dataclass(frozen=True, kw_only=True)
class AuditSettings:
    """What an audit's figures depend on.

    Attributes:
        sample: images to look at, 0 for all. splits: those to audit.
        workers: processes; the figures do not depend on it.
    """

    sample: int = 4000
    seed: int = 0
    splits: Sequence[str] = SPLITS
    workers: int = 1
    quiet: bool = False

    def __post_init__(self) -> None:
        if self.sample < 0 or self.workers < 1:
            raise UserError(
                f"--sample {self.sample} --workers {self.workers}: expected 0 (all) or more, and 1 or more"
            )
        wrong = [split for split in self.splits if split not in SPLITS]
        if wrong or not self.splits:
            raise UserError(f"--split {' '.join(wrong)}: expected some of {', '.join(SPLITS)}")


@dataclass
class _Material:
    """What the probes and the other checks are computed from."""

    source: dict[str, Any]
    generators: tuple[str, ...]
    objects: tuple[str, ...]
    looked: list[AuditedImage]
    counts: dict[str, Any]
    order: dict[str, Any] = field(default_factory=dict)
    whole_duplicates: dict[str, int] | None = None


def audit_layout(layout: Layout, settings: AuditSettings) -> dict[str, Any]:
    """Audit a data set before it is sharded.

    Returns:
        the content of audit.json, plain JSON values; see `audit`.

    Raises:
        UserError: see `Layout.records`; no image of these splits, or none that can be read.
    """
    sampler, counting = StratifiedSampler(settings.sample, settings.seed), CountedLabels(layout.name)
    for ref in refs_of_layout(layout):
        counting.add(ref.path, ref.generator, ref.object)
        if ref.split in settings.splits:
            sampler.offer(ref)
    refs = sampler.chosen()
    if isinstance(layout, ManifestLayout):
        wanted = {ref.path for ref in refs}
        origins = {path: value for path, value in layout.column("source") if path in wanted}
        refs = [replace(ref, origin=origins[ref.path]) for ref in refs]
    looked = _look(refs, layout, settings)
    source = {"kind": "layout", "layout": layout.name, "source": layout.root, "manifest_sha256": None}
    counts = balance(sampler.counts, layout.generators)
    material = _Material(source, tuple(layout.generators), tuple(layout.objects), looked, counts)
    # Sources lie folder by folder; sharding permutes them, so their order is not judged.
    material.order = {"splits": {}, "counting": counting.result()}
    return _audit(material, settings)


def audit_shards(folder: str | Path, settings: AuditSettings) -> dict[str, Any]:
    """Audit a folder that `launch/shard.py` wrote; see `audit_layout`.

    Raises:
        UserError: see `ShardSet`; no image of these splits, or none that can be read.
    """
    manifest, opened = read_manifest(folder), open_splits(folder, settings.splits)
    sampler = StratifiedSampler(settings.sample, settings.seed)
    for ref in refs_of_shards(opened):
        sampler.offer(ref)
    looked = _look(sampler.chosen(), None, settings)
    source = {
        "kind": "shards",
        "layout": manifest["layout"],
        "codec": manifest["codec"]["preset"],
        "manifest_sha256": sha256_of(Path(folder) / "manifest.json"),
    }
    generators, objects = tuple(manifest["generators"]), tuple(manifest["objects"])
    material = _Material(source, generators, objects, looked, balance(sampler.counts, generators))
    material.order = {
        "splits": {one.split: check_mixed(one.rows["generator"].astype(np.int64)) for one in opened},
        "counting": None,
    }
    material.whole_duplicates = manifest.get("duplicates")
    return _audit(material, settings)


def _look(refs: list[SampleRef], layout: Layout | None, settings: AuditSettings) -> list[AuditedImage]:
    if not refs:
        raise UserError(f"--split {' '.join(settings.splits)}: no images there; choose another")
    progress = ProgressBar(len(refs), 0, settings.quiet, "looked at")
    looked = []
    for one in audit_images(refs, layout.source if layout else None, settings.workers):
        looked.append(one)
        progress.advance(1)
    progress.close()
    if all(one.measured is None for one in looked):
        first = looked[0]
        raise UserError(
            f"none of {len(looked)} images can be read, first: {first.ref.name} ({first.reason}); "
            "check the files"
        )
    return looked


def _audit(material: _Material, settings: AuditSettings) -> dict[str, Any]:
    looked = material.looked
    unreadable = [[one.ref.name, one.reason] for one in looked if one.measured is None]
    arrays = stack(looked)
    probes = {kind: _probe_all(arrays, kind, material.generators, settings.seed) for kind in BARS}
    layout = str(material.source["layout"])
    found: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "source": material.source,
        "splits": list(material.counts),
        "settings": {
            "sample": settings.sample,
            "seed": settings.seed,
            "folds": FOLDS,
            "resamples": PROBE_RESAMPLES,
            "bars": BARS,
            "grouped": bool(len(np.unique(arrays["group"])) < len(arrays["group"])),
        },
        "counts": {
            "images": sum(entry["images"] for entry in material.counts.values()),
            "looked_at": len(looked) - len(unreadable),
            "unreadable": len(unreadable),
        },
        "unreadable": unreadable[:_LISTED],
        "probes": probes,
        "origins": _probe_origins(arrays, settings.seed),
        "duplicates": _duplicates([one for one in looked if one.measured is not None]),
        "balance": material.counts,
        "order": {**material.order, "names": compare_with_names(looked, layout, material.objects)},
    }
    found["duplicates"]["whole"] = material.whole_duplicates
    return add_verdict(found)


def _probe_all(
    arrays: dict[str, np.ndarray], kind: str, generators: Iterable[str], seed: int
) -> dict[str, Any]:
    """All fakes, and each generator's, against all photographs; what carries it, over all."""
    data = Data(arrays[kind], arrays["fake"], arrays["group"])
    found: dict[str, Any] = {"overall": probe(data, kind, seed=seed), "generators": {}}
    for name in generators:
        own = arrays["generator"] == name
        if name != "nature" and own.any():
            rows = np.flatnonzero(own | ~arrays["fake"])
            whole = len(rows) == len(own)  # the only generator there is: the same question
            found["generators"][name] = (
                dict(found["overall"]) if whole else probe(data.take(rows), kind, seed=seed)
            )
    overall = found["overall"]
    found["families"], found["features"] = {}, []
    if overall["auroc"] is not None:
        found["families"] = probe_families(data, arrays["jpeg"], kind, seed=seed)
        found["features"] = single_features(data, kind)
    if not leaks(overall, kind):  # what only some generators have would drown in the whole
        for name, one in found["generators"].items():
            if leaks(one, kind):
                rows = np.flatnonzero((arrays["generator"] == name) | ~arrays["fake"])
                own_data = data.take(rows)
                one["families"] = probe_families(own_data, arrays["jpeg"][rows], kind, seed=seed)
                one["features"] = single_features(own_data, kind)
    return found


def _probe_origins(arrays: dict[str, np.ndarray], seed: int) -> dict[str, Any]:
    """Photographs of each origin against the other photographs, by pixel statistics.

    No generator has touched these, so what is found here is how the origins were processed
    (or what they show), and says how far the fakes' figures may be the same.
    """
    real = np.flatnonzero(~arrays["fake"])
    origins = arrays["origin"][real]
    found: dict[str, Any] = {}
    if len(np.unique(origins)) > 1:
        for name in np.unique(origins):
            data = Data(arrays["pixels"][real], origins == name, arrays["group"][real])
            one = probe(data, "pixels", seed=seed)
            images = {"images": one.pop("fake"), "others": one.pop("real")}
            if one["auroc"] is not None:
                one["families"] = probe_families(data, arrays["jpeg"][real], "pixels", seed=seed)
            found[str(name)] = images | one
    return found


def _duplicates(looked: list[AuditedImage]) -> dict[str, Any]:
    """Pairs among the images looked at, by `dataio.sharding.duplicates`, those that matter most first."""
    rows = np.array(
        [(number, *one.measured.looks) for number, one in enumerate(looked) if one.measured], FINGERPRINT
    )
    near, not_compared = near_pairs(rows)
    found: dict[str, Any] = {"images": len(rows), "near_not_compared": not_compared}
    for kind, pairs in (("exact", exact_pairs(rows)), ("near", near)):
        found |= _describe_pairs(kind, pairs, [one.ref for one in looked])
    return found


def _describe_pairs(kind: str, pairs: Pairs, refs: list[SampleRef]) -> dict[str, Any]:
    across, both = 0, 0
    listed: list[tuple[bool, bool, int, list[Any]]] = []
    for first, second, distance in zip(pairs.first, pairs.second, pairs.distance, strict=True):
        one, other = refs[first], refs[second]
        crosses = one.split != other.split
        labels = (one.generator == "nature") != (other.generator == "nature")
        across, both = across + crosses, both + labels
        names = [[ref.split, ref.generator, ref.name] for ref in (one, other)]
        listed.append((not labels, not crosses, len(listed), [int(distance), *names]))
    return {
        kind: len(listed),
        f"{kind}_across_splits": across,
        f"{kind}_real_and_fake": both,
        f"{kind}_pairs": [pair for *_, pair in sorted(listed, key=lambda entry: entry[:3])[:_LISTED]],
    }


def check_audit_path(path: str | Path) -> None:
    """Find out whether the result can be written before the work begins, leaving nothing behind.

    Raises:
        UserError: it cannot.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"--output {path}: is a folder, expected the name of a JSON file")
    nearest = path.absolute().parent
    while not os.path.lexists(nearest):
        nearest = nearest.parent
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise UserError(f"--output {path}: cannot be written ({error.strerror}); choose another") from None


def write_audit(path: str | Path, found: dict[str, Any]) -> None:
    """Write an audit's JSON, atomically; its folder is made where it is missing.

    Raises:
        UserError: the file cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(found, indent=1, allow_nan=False) + "\n")
    except OSError as error:
        raise UserError(f"--output {path}: cannot be written ({error.strerror}); choose another") from None
