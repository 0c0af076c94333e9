"""Writing shards: from a layout's sources to tars, their indexes and the manifest.

A shard is committed by its sidecar in OUTPUT/.work, renamed into place after the tar and
its index are on disk; a restart skips committed shards and writes the others again, byte
for byte the same. Nothing in the result depends on the clock, the host or the workers.
"""

import concurrent.futures
import csv
import ctypes
import fcntl
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import features
from tqdm import tqdm

from dataio.atomic import write_text, write_with
from dataio.codec import CodecPolicy
from dataio.errors import UserError
from dataio.index import MANIFEST_FORMAT, SAMPLE, read_manifest
from dataio.plan import Plan, ShardTask, check_settings, make_plan, read_plan
from dataio.records import SPLITS, Layout
from dataio.shard import WORK, save_array, write_shard
from dataio.source import Source

REJECTED = "rejected.csv"


def default_workers() -> int:
    return len(os.sched_getaffinity(0))


# ---- workers ------------------------------------------------------------------------

_worker: dict[str, Any] = {}


def _start_worker(output: Path, plan: Plan, source: Source) -> None:
    # No worker outlives its parent, however that dies; Ctrl-C is the parent's to handle.
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
    if os.getppid() == 1:
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _worker.update(output=output, plan=plan, source=source)


def _work(task: ShardTask) -> ShardTask:
    write_shard(_worker["output"], _worker["plan"], task, _worker["source"])
    return task


def _run_tasks(
    output: Path, plan: Plan, source: Source, tasks: list[ShardTask], workers: int
) -> Iterator[ShardTask]:
    if workers == 1 or len(tasks) == 1:
        for task in tasks:
            write_shard(output, plan, task, source)
            yield task
        return
    # Spawned, not forked: the parent may have threads (DALI, torch).
    with concurrent.futures.ProcessPoolExecutor(
        min(workers, len(tasks)),
        multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(output, plan, source),
    ) as pool:
        pending = [pool.submit(_work, task) for task in tasks]
        try:
            for future in concurrent.futures.as_completed(pending):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


class Progress:
    """A bar where a person watches, a line every 30 s where a log does."""

    def __init__(self, total: int, done: int, quiet: bool) -> None:
        self._total, self._done, self._quiet = total, done, quiet
        self._bar = None
        if not quiet and sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=done, unit="img", unit_scale=True)
        self._spoke = time.monotonic()

    def advance(self, count: int) -> None:
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        elif not self._quiet and time.monotonic() - self._spoke > 30:
            self._spoke = time.monotonic()
            print(f"{self._done}/{self._total} images sharded", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


# ---- the whole ----------------------------------------------------------------------


def write_shards(
    layout: Layout,
    output: str | Path,
    policy: CodecPolicy,
    *,
    workers: int = 1,
    samples_per_shard: int = 1000,
    seed: int = 0,
    extra_settings: dict[str, Any] | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Write, or finish writing, a shard folder.

    Args:
        layout: the sources. output: the folder. policy: from `preset_policy`.
        workers: processes; the bytes are the same for any number.
        samples_per_shard: at most, and exactly but for rejected files and the last shard.
        seed: of the permutation.
        extra_settings: the layout's options, so that a rerun with others is refused.

    Returns:
        the manifest.

    Raises:
        UserError: the folder is in use, holds something else, was begun with other
            settings, cannot be written; nothing usable in the source.
    """
    output = Path(output)
    if workers < 1 or samples_per_shard < 1:
        raise UserError(f"--workers {workers} --samples-per-shard {samples_per_shard}: expected at least 1")
    settings = {
        "layout": layout.name,
        "codec": {**policy.to_dict(), "history": None},
        "samples_per_shard": samples_per_shard,
        "seed": seed,
        **(extra_settings or {}),
    }
    if (output / "manifest.json").is_file():
        manifest = read_manifest(output)
        check_settings(output, manifest["plan"], settings)
        shutil.rmtree(output / WORK, ignore_errors=True)  # killed between the manifest and this
        return manifest
    if output.is_dir() and any(output.iterdir()) and not (output / WORK).is_dir():
        raise UserError(f"--output {output}: holds something else; choose an empty or new folder")
    try:
        created = not output.exists()
        (output / WORK).mkdir(parents=True, exist_ok=True)
        lock = open(output / WORK / "lock", "w")  # noqa: SIM115 (held while writing)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written ({error.strerror}); choose another") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"--output {output}: another process is writing it; wait for it or stop it"
            ) from None
        plan = _plan(layout, output, policy, settings, created)
        try:
            _write_all(layout, output, plan, workers, quiet)
            manifest = _finish(layout, output, plan)
        except OSError as error:
            raise UserError(
                f"--output {output}: {error.strerror or error}; mend that and run the same again"
            ) from None
    shutil.rmtree(output / WORK)
    return manifest


def _plan(layout: Layout, output: Path, policy: CodecPolicy, settings: dict[str, Any], created: bool) -> Plan:
    work = output / WORK
    plan = read_plan(work)
    if plan is not None:
        check_settings(output, plan.settings, {**settings, "source": layout.root})
        return plan
    try:
        return make_plan(layout, work, policy, {**settings, "source": layout.root})
    except UserError:
        # Nothing half-written: what was made for the plan goes with it.
        shutil.rmtree(work)
        if created:
            output.rmdir()
        raise


def _sidecar(output: Path, task: ShardTask) -> dict[str, Any] | None:
    """The record of a committed shard; None where it is yet to be written."""
    try:
        done = json.loads((output / WORK / f"{task.split}-{task.number:06d}.json").read_text())
        size = (output / f"{task.name}.tar").stat().st_size
    except (OSError, ValueError):
        return None
    return done if size == done["bytes"] else None


def _write_all(layout: Layout, output: Path, plan: Plan, workers: int, quiet: bool) -> None:
    for split in SPLITS:
        (output / split).mkdir(exist_ok=True)
        for leftover in (output / split).glob(".*.tmp"):
            leftover.unlink()
    todo = [task for task in plan.tasks if _sidecar(output, task) is None]
    progress = Progress(plan.sources, plan.sources - sum(task.count for task in todo), quiet)
    for task in _run_tasks(output, plan, layout.source, todo, workers):
        progress.advance(task.count)
    progress.close()


def _finish(layout: Layout, output: Path, plan: Plan) -> dict[str, Any]:
    """Merge the sidecars, in the plan's order, into the indexes and the manifest."""
    rejected, warned = list(plan.skipped), []
    splits: dict[str, Any] = {}
    for split in SPLITS:
        shards: list[dict[str, Any]] = []
        tables = []
        for task in (t for t in plan.tasks if t.split == split):
            done = _sidecar(output, task)
            assert done is not None, f"{task.name} was just written"
            rejected += done["rejected"]
            warned += done["warnings"]
            if done["samples"] == 0:  # every file of it was rejected: an empty tar helps nobody
                for suffix in (".tar", ".idx"):
                    (output / f"{task.name}{suffix}").unlink(missing_ok=True)
                continue
            table = np.load(output / WORK / f"{task.split}-{task.number:06d}.npy")
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
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
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
    lines.append(f"{len(rejected)} rejected, {len(warned)} kept with a warning")
    lines += [f"  rejected {entry['path']}: {entry['reason']}" for entry in rejected[:5]]
    return "\n".join(lines)
