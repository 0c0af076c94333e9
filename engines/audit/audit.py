"""Audit a data set for shortcuts: probes that never see the picture, duplicates, balance, order.

A container leak is a fail, since a detector can then be perfect without learning anything about
pictures. A leak in simple pixel statistics is a warn: it may be a different resize factor or JPEG
history, or the generators' own traces. Too few images for an answer are a warn too, never a pass.
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
from dataio.core.errors import UserError, writing
from dataio.core.progress import ProgressBar
from dataio.layouts.base import SPLITS, Layout
from dataio.layouts.manifest import ManifestLayout
from dataio.sharding.duplicates import FINGERPRINT, Pairs, exact_pairs, near_pairs
from dataio.shards.manifest import read_manifest, sha256_of
from dataio.sources.remote_path import is_url, place_of
from engines.audit.gate import AUDIT, FORMAT, VERSION
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
    """The settings of an audit.

    Attributes:
        sample: images to measure, 0 for all. splits: the splits to audit.
        workers: processes; the figures do not depend on it.
    """

    sample: int = 4000
    seed: int = 0
    splits: Sequence[str] = SPLITS
    workers: int = 1
    quiet: bool = False

    def __post_init__(self) -> None:
        if self.sample < 0:
            raise UserError("expected 1 or more, or 0 for all", field="sample", value=self.sample)
        if self.workers < 1:
            raise UserError("expected 1 or more", field="workers", value=self.workers)
        wrong = [split for split in self.splits if split not in SPLITS]
        if wrong or not self.splits:
            raise UserError(f"expected some of {', '.join(SPLITS)}", field="split", value=" ".join(wrong))


@dataclass
class _Material:
    """The data that the probes and the other checks are computed from."""

    source: dict[str, Any]
    generators: tuple[str, ...]
    objects: tuple[str, ...]
    images: list[AuditedImage]
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
        sampled = {ref.path for ref in refs}
        origins = {path: value for path, value in layout.column("source") if path in sampled}
        refs = [replace(ref, origin=origins[ref.path]) for ref in refs]
    images = _measure_refs(refs, layout, settings)
    source = {"kind": "layout", "layout": layout.name, "source": layout.root, "manifest_sha256": None}
    counts = balance(sampler.counts, layout.generators)
    material = _Material(source, tuple(layout.generators), tuple(layout.objects), images, counts)
    # Sources are ordered by folder and sharding permutes them, so their order is not checked.
    material.order = {"splits": {}, "counting": counting.result()}
    return _audit(material, settings)


def audit_shards(folder: str | Path, settings: AuditSettings) -> dict[str, Any]:
    """Audit a folder that `telltale shard` wrote; see `audit_layout`.

    Raises:
        UserError: see `ShardSet`; no image of these splits, or none that can be read.
    """
    manifest, opened = read_manifest(folder), open_splits(folder, settings.splits)
    sampler = StratifiedSampler(settings.sample, settings.seed)
    for ref in refs_of_shards(opened):
        sampler.offer(ref)
    images = _measure_refs(sampler.chosen(), None, settings)
    source = {
        "kind": "shards",
        "layout": manifest["layout"],
        "codec": manifest["codec"]["preset"],
        "manifest_sha256": sha256_of(place_of(folder) / "manifest.json"),
    }
    generators, objects = tuple(manifest["generators"]), tuple(manifest["objects"])
    material = _Material(source, generators, objects, images, balance(sampler.counts, generators))
    material.order = {
        "splits": {shards.split: check_mixed(shards.rows["generator"].astype(np.int64)) for shards in opened},
        "counting": None,
    }
    material.whole_duplicates = manifest.get("duplicates")
    return _audit(material, settings)


def _measure_refs(
    refs: list[SampleRef], layout: Layout | None, settings: AuditSettings
) -> list[AuditedImage]:
    if not refs:
        raise UserError("has no images; choose another", field="split", value=" ".join(settings.splits))
    progress = ProgressBar(len(refs), 0, settings.quiet, "measured")
    images = []
    for image in audit_images(refs, layout.source if layout else None, settings.workers):
        images.append(image)
        progress.advance(1)
    progress.close()
    if all(image.measured is None for image in images):
        first = images[0]
        raise UserError(
            f"none of {len(images)} images can be read, first: {first.ref.name} ({first.reason}); "
            "check the files"
        )
    return images


def _audit(material: _Material, settings: AuditSettings) -> dict[str, Any]:
    images = material.images
    unreadable = [[image.ref.name, image.reason] for image in images if image.measured is None]
    arrays = stack(images)
    probes = {kind: _probe_all(arrays, kind, material.generators, settings.seed) for kind in BARS}
    layout = str(material.source["layout"])
    results: dict[str, Any] = {
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
            "looked_at": len(images) - len(unreadable),
            "unreadable": len(unreadable),
        },
        "unreadable": unreadable[:_LISTED],
        "probes": probes,
        "origins": _probe_origins(arrays, settings.seed),
        "duplicates": _duplicates([image for image in images if image.measured is not None]),
        "balance": material.counts,
        "order": {**material.order, "names": compare_with_names(images, layout, material.objects)},
    }
    results["duplicates"]["whole"] = material.whole_duplicates
    return add_verdict(results)


def _probe_all(
    arrays: dict[str, np.ndarray], kind: str, generators: Iterable[str], seed: int
) -> dict[str, Any]:
    """Probe all fakes and each generator's against all photographs; families and features over all."""
    data = Data(arrays[kind], arrays["fake"], arrays["group"])
    results: dict[str, Any] = {"overall": probe(data, kind, seed=seed), "generators": {}}
    for name in generators:
        mask = arrays["generator"] == name
        if name != "nature" and mask.any():
            rows = np.flatnonzero(mask | ~arrays["fake"])
            whole = len(rows) == len(mask)  # the only generator: the same question as overall
            results["generators"][name] = (
                dict(results["overall"]) if whole else probe(data.take(rows), kind, seed=seed)
            )
    overall = results["overall"]
    results["families"], results["features"] = {}, []
    if overall["auroc"] is not None:
        results["families"] = probe_families(data, arrays["jpeg"], kind, seed=seed)
        results["features"] = single_features(data, kind)
    if not leaks(overall, kind):  # a leak of few generators may vanish in the whole
        for name, entry in results["generators"].items():
            if leaks(entry, kind):
                rows = np.flatnonzero((arrays["generator"] == name) | ~arrays["fake"])
                generator_data = data.take(rows)
                entry["families"] = probe_families(generator_data, arrays["jpeg"][rows], kind, seed=seed)
                entry["features"] = single_features(generator_data, kind)
    return results


def _probe_origins(arrays: dict[str, np.ndarray], seed: int) -> dict[str, Any]:
    """Photographs of each origin against the other photographs, by pixel statistics.

    Generators did not make these, so a leak shows how the origins were processed (or what they
    depict), and how much of the fakes' figures may have the same cause.
    """
    real = np.flatnonzero(~arrays["fake"])
    origins = arrays["origin"][real]
    results: dict[str, Any] = {}
    if len(np.unique(origins)) > 1:
        for name in np.unique(origins):
            data = Data(arrays["pixels"][real], origins == name, arrays["group"][real])
            entry = probe(data, "pixels", seed=seed)
            images = {"images": entry.pop("fake"), "others": entry.pop("real")}
            if entry["auroc"] is not None:
                entry["families"] = probe_families(data, arrays["jpeg"][real], "pixels", seed=seed)
            results[str(name)] = images | entry
    return results


def _duplicates(images: list[AuditedImage]) -> dict[str, Any]:
    """Duplicates among the measured images by `dataio.sharding.duplicates`, the most relevant first."""
    rows = np.array(
        [(number, *image.measured.fingerprint) for number, image in enumerate(images) if image.measured],
        FINGERPRINT,
    )
    near, not_compared = near_pairs(rows)
    results: dict[str, Any] = {"images": len(rows), "near_not_compared": not_compared}
    for kind, pairs in (("exact", exact_pairs(rows)), ("near", near)):
        results |= _describe_pairs(kind, pairs, [image.ref for image in images])
    return results


def _describe_pairs(kind: str, pairs: Pairs, refs: list[SampleRef]) -> dict[str, Any]:
    across, both = 0, 0
    listed: list[tuple[bool, bool, int, list[Any]]] = []
    for first, second, distance in zip(pairs.first, pairs.second, pairs.distance, strict=True):
        pair = refs[first], refs[second]
        crosses = pair[0].split != pair[1].split
        labels = (pair[0].generator == "nature") != (pair[1].generator == "nature")
        across, both = across + crosses, both + labels
        names = [[ref.split, ref.generator, ref.name] for ref in pair]
        listed.append((not labels, not crosses, len(listed), [int(distance), *names]))
    return {
        kind: len(listed),
        f"{kind}_across_splits": across,
        f"{kind}_real_and_fake": both,
        f"{kind}_pairs": [entry for *_, entry in sorted(listed, key=lambda row: row[:3])[:_LISTED]],
    }


def check_audit_path(path: str | Path) -> None:
    """Check, before the work, that the result can be written; leaves no file behind.

    Raises:
        UserError: the path cannot be written.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError("is a folder, expected the name of a JSON file", field="output", value=path)
    nearest = path.absolute().parent
    while not os.path.lexists(nearest):
        nearest = nearest.parent
    with writing(path, field="output"), tempfile.TemporaryFile(dir=nearest):
        pass


def write_audit(path: str | Path, audit: dict[str, Any]) -> None:
    """Write an audit's JSON atomically; a missing folder is created.

    Raises:
        UserError: the file cannot be written.
    """
    path = Path(path)
    with writing(path, field="output"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(audit, indent=1, allow_nan=False) + "\n")


def run_audit(
    source: Layout | str | Path, settings: AuditSettings, output: str | Path | None = None
) -> tuple[dict[str, Any], Path]:
    """Audit a data set or a folder of shards and write the result.

    Args:
        source: a layout, or a folder that `telltale shard` wrote.
        output: JSON file; None for audit.json in the folder of shards, which must be local then.

    Returns:
        the content of the file, and its path.

    Raises:
        UserError: see `audit_layout`, `audit_shards` and `check_audit_path`.
    """
    if isinstance(source, str | Path):
        if output is None and is_url(source):
            raise UserError(
                f"missing; {source} is not written to: give the name of a JSON file", field="output"
            )
        output = output or Path(source) / AUDIT
        check_audit_path(output)
        audit = audit_shards(source, settings)
    else:
        if output is None:
            raise UserError("missing; give the name of a JSON file", field="output")
        check_audit_path(output)
        audit = audit_layout(source, settings)
    write_audit(output, audit)
    return audit, Path(output)
