"""Finishing a shard folder: the shards' sidecars merged into indexes and a manifest."""

import csv
import io
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import features

from dataio.atomic import write_text, write_with
from dataio.duplicates import DUPLICATES, report_duplicates
from dataio.errors import UserError
from dataio.index import MANIFEST_FORMAT, SAMPLE, sha256_of
from dataio.layouts.genimage import is_known_broken
from dataio.plan import Plan
from dataio.records import SPLITS, Layout
from dataio.shard import PRINTS, WORK, read_sidecar, save_array, sidecar_path

REJECTED = "rejected.csv"
_KNOWN = "known: it is broken in GenImage's release"


def finish_folder(
    layout: Layout, output: Path, plan: Plan, *, allow_duplicates: bool = False
) -> dict[str, Any]:
    """Merge the sidecars, in the plan's order, into the indexes and the manifest.

    Returns:
        the manifest.

    Raises:
        UserError: every image was rejected, or one is in two splits and that is not allowed.
        OSError: the folder cannot be written.
    """
    # First, so that what it refuses can be finished later as if nothing had happened.
    prints = np.concatenate([np.load(sidecar_path(output, task, PRINTS)) for task in plan.tasks])
    duplicates = report_duplicates(output, output / WORK, plan, prints, allowed=allow_duplicates)
    rejected, warned = list(plan.skipped), []
    splits: dict[str, Any] = {}
    for split in SPLITS:
        shards: list[dict[str, Any]] = []
        tables = []
        for task in (t for t in plan.tasks if t.split == split):
            done = read_sidecar(output, task)
            assert done is not None, f"{task.name} is there, it was asked"
            rejected += [[path, _with_what_is_known(path, reason)] for path, reason in done["rejected"]]
            warned += done["warnings"]
            if done["samples"] == 0:  # every file of it was rejected: an empty tar helps nobody
                for suffix in (".tar", ".idx"):
                    (output / f"{task.name}{suffix}").unlink(missing_ok=True)
                continue
            table = np.load(sidecar_path(output, task, ".npy"))
            table["shard"] = len(shards)
            tables.append(table)
            facts = {key: done[key] for key in ("samples", "bytes", "sha256", "idx_bytes", "idx_sha256")}
            shards.append({"file": f"{task.name}.tar", **facts})
        rows = np.concatenate(tables) if tables else np.zeros(0, SAMPLE)
        splits[split] = {**_describe(output, split, rows, plan.generators), "shards": shards}
    if not any(entry["samples"] for entry in splits.values()):
        raise UserError(
            f"--source {layout.root}: every one of {plan.sources} images was rejected; see {output}/{WORK}"
        )
    manifest = {
        "format": MANIFEST_FORMAT,
        "version": 1,
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
    return manifest


def _with_what_is_known(path: str, reason: str) -> str:
    # Such a file is kept where somebody has mended it, so only a rejected one is recognised.
    return f"{reason} ({_KNOWN})" if is_known_broken(path) else reason


def _describe(output: Path, split: str, rows: np.ndarray, generators: Sequence[str]) -> dict[str, Any]:
    """Write a split's index and describe it for the manifest."""
    path = output / split / "index.npy"
    write_with(path, lambda temporary: save_array(temporary, rows))
    counts = Counter(rows["generator"].tolist())
    largest = {
        name: int(rows[column].max()) if len(rows) else 0
        for name, column in (("width", "width"), ("height", "height"), ("bytes", "size"))
    }
    return {
        "samples": len(rows),
        "generators": {name: counts[number] for number, name in enumerate(generators)},
        "objects_known": int(np.count_nonzero(rows["object"] >= 0)),
        "largest": largest,
        "index": {
            "file": f"{split}/index.npy",
            "bytes": path.stat().st_size,
            "sha256": sha256_of(path),
        },
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
    rejected, warned = manifest["rejected"], manifest["warnings"]
    known = sum(entry["reason"].endswith(f"({_KNOWN})") for entry in rejected)
    of_them = f" ({known} of them broken in GenImage's release)" if known else ""
    lines.append(f"{len(rejected)} rejected{of_them}, {len(warned)} kept with a warning")
    lines += [f"  rejected {entry['path']}: {entry['reason']}" for entry in rejected[:5]]
    found = manifest.get("duplicates", {})  # not in older folders
    if found.get("exact") or found.get("near"):
        lines.append(
            f"{found['exact']} duplicates, {found['exact_across_splits']} of them across splits; {found['near']} "
            f"near-duplicates, {found['near_across_splits']} of them across splits: see {DUPLICATES}"
        )
    return "\n".join(lines)
