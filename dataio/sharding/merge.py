"""Finish a shard folder: merge the shards' sidecars into indexes and a manifest."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import features

from dataio.core.atomic import write_text, write_with
from dataio.core.errors import UserError
from dataio.layouts.base import SPLITS, Layout
from dataio.layouts.genimage import is_known_broken
from dataio.sharding.duplicates import DUPLICATES, report_duplicates
from dataio.sharding.one_class import one_class_notes
from dataio.sharding.plan import ShardPlan
from dataio.sharding.writer import IDENTITIES, PRINTS, WORK, read_sidecar, save_array, sidecar_path
from dataio.shards import shard_table
from dataio.shards.manifest import IDENTITY, MANIFEST_FORMAT, SAMPLE, read_manifest, sha256_of

REJECTED = "rejected.csv"
_KNOWN = "known: it is broken in GenImage's release"


def finish_folder(
    layout: Layout, output: Path, plan: ShardPlan, *, allow_duplicates: bool = False
) -> dict[str, Any]:
    """Merge the sidecars, in the plan's order, into the indexes and the manifest.

    Returns:
        the manifest.

    Raises:
        UserError: every image was rejected, or one is in two splits and that is not allowed.
        OSError: the folder cannot be written.
    """
    # First: nothing is written yet if this refuses, so the folder can be finished later.
    prints = np.concatenate([np.load(sidecar_path(output, task, PRINTS)) for task in plan.tasks])
    duplicates = report_duplicates(output, output / WORK, plan, prints, allowed=allow_duplicates)
    rejected, warned = list(plan.skipped), []
    splits: dict[str, Any] = {}
    for split in SPLITS:
        shards: list[dict[str, Any]] = []
        files: list[Path] = []
        identities: list[Path] = []
        for task in (t for t in plan.tasks if t.split == split):
            done = read_sidecar(output, task)
            assert done is not None, f"{task.name} was checked to be written"
            rejected += [[path, _with_known_fault(path, reason)] for path, reason in done["rejected"]]
            warned += done["warnings"]
            if done["samples"] == 0:  # every file was rejected
                for suffix in (".tar", ".idx"):
                    (output / f"{task.name}{suffix}").unlink(missing_ok=True)
                continue
            files.append(sidecar_path(output, task, ".npy"))
            facts = {key: done[key] for key in ("samples", "bytes", "sha256", "idx_bytes", "idx_sha256")}
            shards.append({"file": f"{task.name}.tar", **facts})
            identities.append(sidecar_path(output, task, IDENTITIES))
        samples = sum(shard["samples"] for shard in shards)
        described = _describe(output, split, files, samples, plan.generators)
        splits[split] = {
            **described,
            **_join_identities(output, split, identities, samples),
            **_list_shards(output, split, shards),
        }
    if not any(entry["samples"] for entry in splits.values()):
        raise UserError(
            f"all {plan.sources} images were rejected; see {output}/{WORK}", field="source", value=layout.root
        )
    manifest = {
        "format": MANIFEST_FORMAT,
        "version": 2 if any("table" in entry for entry in splits.values()) else 1,
        "layout": layout.name,
        "generators": list(plan.generators),
        "objects": list(plan.objects),
        "subsets": list(plan.subsets),
        "codec": plan.policy.to_dict(),
        "plan": {
            **{key: value for key, value in plan.settings.items() if key != "source"},
            "sources": plan.sources,
            "sha256": plan.sha256,
        },
        "splits": splits,
        "duplicates": duplicates,
        "rejected": [{"path": path, "reason": reason} for path, reason in sorted(rejected)],
        "notes": list(plan.notes),
        "warnings": [{"path": path, "reason": reason} for path, reason in sorted(warned)],
        "versions": {
            "pillow": features.version("pil"),
            "libjpeg": features.version("libjpeg_turbo") or features.version("jpg"),
        },
    }
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([("path", "reason"), *sorted(map(tuple, rejected))])
    write_text(output / REJECTED, text.getvalue())
    write_text(output / "manifest.json", json.dumps(manifest, indent=1) + "\n")
    return read_manifest(output)


def _with_known_fault(path: str, reason: str) -> str:
    # A repaired file of this name is kept, so only rejected ones are marked.
    return f"{reason} ({_KNOWN})" if is_known_broken(path) else reason


def _describe(
    output: Path, split: str, files: Sequence[Path], samples: int, generators: Sequence[str]
) -> dict[str, Any]:
    """Write a split's index from the shards' own, one at a time, and describe it for the manifest."""
    path = output / split / "index.npy"
    counts, known = np.zeros(len(generators), np.int64), 0
    low, high = {"width": 0, "height": 0}, {"width": 0, "height": 0, "size": 0}

    def write(temporary: Path) -> None:
        nonlocal known
        with open(temporary, "wb") as file:
            _write_header(file, SAMPLE, samples)
            for number, name in enumerate(files):
                rows = np.load(name)
                rows["shard"] = number
                file.write(rows.tobytes())
                counts[:] += np.bincount(rows["generator"], minlength=len(counts))
                known += int(np.count_nonzero(rows["object"] >= 0))
                for column in high:
                    high[column] = max(high[column], int(rows[column].max()))
                for column in low:
                    least = int(rows[column].min())
                    low[column] = min(low[column], least) if number else least

    write_with(path, write)
    return {
        "samples": samples,
        "generators": dict(zip(generators, counts.tolist(), strict=True)),
        "objects_known": known,
        "smallest": low,
        "largest": {"width": high["width"], "height": high["height"], "bytes": high["size"]},
        "index": _file(output, path),
    }


def _write_header(file: BinaryIO, dtype: np.dtype[np.void], rows: int) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (rows,)}
    np.lib.format.write_array_header_1_0(file, header)


def _join_identities(output: Path, split: str, files: Sequence[Path], samples: int) -> dict[str, Any]:
    """Write a split's identities, one shard after the other, and describe the file for the manifest."""
    if not all(name.is_file() for name in files):  # some shards were written by an earlier telltale
        return {}
    path = output / split / "identity.npy"

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            _write_header(file, IDENTITY, samples)
            for name in files:
                file.write(np.load(name).tobytes())

    write_with(path, write)
    return {"identities": _file(output, path)}


def _list_shards(output: Path, split: str, shards: list[dict[str, Any]]) -> dict[str, Any]:
    """The split's shards for the manifest: a list, or for many shards a table that is written here."""
    path = output / split / shard_table.TABLE
    if len(shards) < shard_table.TABLE_FROM:
        return {"shards": shards}
    write_with(path, lambda temporary: save_array(temporary, shard_table.to_entries(shards)))
    return {"table": {**_file(output, path), "shards": len(shards)}}


def _file(output: Path, path: Path) -> dict[str, Any]:
    return {
        "file": str(path.relative_to(output)),
        "bytes": path.stat().st_size,
        "sha256": sha256_of(path),
    }


def summary(manifest: dict[str, Any]) -> str:
    """The manifest as a table for the terminal: images per split and generator."""
    lines = [f"{'':24}" + "".join(f"{split:>10}" for split in SPLITS)]
    for name in manifest["generators"]:
        counts = [manifest["splits"][split]["generators"].get(name, 0) for split in SPLITS]
        if any(counts):
            lines.append(f"{name:24}" + "".join(f"{count:>10}" for count in counts))
    for title, key in (("all", "samples"), ("object known", "objects_known")):
        lines.append(f"{title:24}" + "".join(f"{manifest['splits'][split][key]:>10}" for split in SPLITS))
    lines.append(
        f"{'shards':24}" + "".join(f"{len(manifest['splits'][split]['shards']):>10}" for split in SPLITS)
    )
    lines += one_class_notes(manifest)
    rejected, warned = manifest["rejected"], manifest["warnings"]
    known = sum(entry["reason"].endswith(f"({_KNOWN})") for entry in rejected)
    of_them = f" ({known} of them broken in GenImage's release)" if known else ""
    lines.append(f"{len(rejected)} rejected{of_them}, {len(warned)} kept with a warning")
    lines += [f"  rejected {entry['path']}: {entry['reason']}" for entry in rejected[:5]]
    lines += [f"  kept {entry['path']}: {entry['reason']}" for entry in warned[:5]]
    lines += [f"note: {note}" for note in manifest.get("notes", [])]
    duplicates = manifest.get("duplicates", {})  # not in older folders
    if duplicates.get("exact") or duplicates.get("near"):
        lines.append(
            f"{duplicates['exact']} duplicates, {duplicates['exact_across_splits']} of them across splits; "
            f"{duplicates['near']} near-duplicates, {duplicates['near_across_splits']} of them across splits: "
            f"see {DUPLICATES}"
        )
    return "\n".join(lines)
