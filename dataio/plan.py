"""The plan of a shard folder: which source goes where, decided before anything is written.

Every worker and every restart follows the same plan, which is why the bytes are the same
for any number of workers and after any number of kills.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dataio.atomic import write_text
from dataio.codec import CodecPolicy, jpeg_history
from dataio.errors import UserError
from dataio.records import SPLITS, Layout, Record

PLAN_LINES = "plan.jsonl"
PLAN_HEAD = "plan.json"
HISTORY_SAMPLE = 20_000
_LOSSY_SUFFIXES = (".jpg", ".jpeg")


@dataclass(frozen=True)
class ShardTask:
    """One shard to write: `count` plan lines from byte `offset`, keys from `first_key`."""

    split: str
    number: int
    first_key: int
    count: int
    offset: int

    @property
    def name(self) -> str:
        return f"{self.split}/{self.number:06d}"


@dataclass(frozen=True)
class Plan:
    """What was decided.

    Attributes:
        settings: the flags it was made with; a rerun must have the same.
        policy: the codec policy, its histogram filled in.
        generators, objects, subsets: label spaces.
        object_in_json: "index" or "name".
        skipped: (path, reason) that the layout set aside.
        sources: how many images. sha256: of the plan's lines.
        tasks: the shards.
    """

    settings: dict[str, Any]
    policy: CodecPolicy
    generators: tuple[str, ...]
    objects: tuple[str, ...]
    subsets: tuple[str, ...]
    object_in_json: str
    skipped: list[list[str]]
    sources: int
    sha256: str
    tasks: list[ShardTask]


def _rank(seed: int, path: str) -> bytes:
    # A hash, not a random generator: the permutation must not change with a library.
    return hashlib.blake2b(f"{seed}:{path}".encode("utf-8", "surrogateescape"), digest_size=16).digest()


def _history(layout: Layout, records: list[Record], seed: int) -> dict[str, int] | None:
    """Histogram of the JPEG history of (a hash-chosen sample of) the lossy training sources."""
    lossy = [r.path for r in records if r.split == "train" and r.path.lower().endswith(_LOSSY_SUFFIXES)]
    lossy = lossy or [r.path for r in records if r.path.lower().endswith(_LOSSY_SUFFIXES)]
    lossy.sort(key=lambda path: _rank(seed, path))
    counts: Counter[str] = Counter()
    for path in lossy[:HISTORY_SAMPLE]:
        try:
            found = jpeg_history(layout.read(path))
        except OSError:
            continue
        if found:
            counts[found] += 1
    return dict(sorted(counts.items())) or None


def make_plan(layout: Layout, work: Path, policy: CodecPolicy, settings: dict[str, Any]) -> Plan:
    """List the sources, permute them inside their splits, cut them into shards; write it down.

    Raises:
        UserError: see `Layout.records`.
    """
    seed, samples_per_shard = settings["seed"], settings["samples_per_shard"]
    records = list(layout.records())
    if policy.match_history:
        policy = replace(policy, history=_history(layout, records, seed))
    subsets = tuple(sorted({record.subset for record in records}))
    digest, tasks, offset, key = hashlib.sha256(), [], 0, 0
    part = work / f"{PLAN_LINES}.part"
    with open(part, "wb") as file:
        for split in SPLITS:
            own = sorted((r for r in records if r.split == split), key=lambda r: _rank(seed, r.path))
            for number, start in enumerate(range(0, len(own), samples_per_shard)):
                chunk = own[start : start + samples_per_shard]
                tasks.append(ShardTask(split, number, key, len(chunk), offset))
                for record in chunk:
                    line = (
                        json.dumps([record.path, record.generator, record.object, record.subset]).encode()
                        + b"\n"
                    )
                    digest.update(line)
                    offset += file.write(line)
                key += len(chunk)
    part.rename(work / PLAN_LINES)
    plan = Plan(
        settings,
        policy,
        tuple(layout.generators),
        tuple(layout.objects),
        subsets,
        layout.object_in_json,
        sorted([path, reason] for path, reason in layout.skipped),
        len(records),
        digest.hexdigest(),
        tasks,
    )
    head = {**vars(plan), "policy": policy.to_dict(), "tasks": [vars(task) for task in tasks]}
    write_text(work / PLAN_HEAD, json.dumps(head))
    return plan


def read_plan(work: Path) -> Plan | None:
    """The plan of a folder that is being written; None where there is none yet."""
    try:
        head = json.loads((work / PLAN_HEAD).read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{work / PLAN_HEAD}: cannot be read ({error}); remove {work.parent} and start again"
        ) from None
    head["policy"] = CodecPolicy.from_dict(head["policy"])
    head["tasks"] = [ShardTask(**task) for task in head["tasks"]]
    for name in ("generators", "objects", "subsets"):
        head[name] = tuple(head[name])
    return Plan(**head)


def read_task(work: Path, task: ShardTask) -> Iterator[tuple[str, str, int | None, str]]:
    """(path, generator, object, subset) of a shard's sources, in order."""
    with open(work / PLAN_LINES, "rb") as file:
        file.seek(task.offset)
        for _ in range(task.count):
            path, generator, label, subset = json.loads(file.readline())
            yield path, generator, label, subset


def check_settings(folder: Path, stored: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise a UserError that names the first setting in which a rerun differs."""
    for name in wanted:
        if stored.get(name) != wanted[name]:
            raise UserError(
                f"{folder}: was begun with {name} {stored.get(name)!r}, not {wanted[name]!r}; "
                "use the same, or another --output, or remove the folder"
            )
