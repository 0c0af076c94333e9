"""The plan of a shard folder: which source goes where, decided before anything is written.

Every worker and every restart follows the same plan, which is why the bytes are the same
for any number of workers and after any number of kills.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

from dataio.core.atomic import write_text
from dataio.core.errors import UserError
from dataio.images.codec import CodecPolicy
from dataio.layouts.base import SPLITS, Layout
from dataio.sharding.history import find_history
from dataio.sharding.one_class import require_both_classes

PLAN_LINES = "plan.jsonl"
PLAN_HEAD = "plan.json"
_SPOOLS = 64  # files that a split is sorted in
_RANK_DIGITS = 32


@dataclass(frozen=True)
class ShardSpec:
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
class ShardPlan:
    """The plan of a shard folder.

    Attributes:
        settings: the flags it was made with; a rerun must have the same.
        policy: the codec policy, its histogram filled in.
        generators, objects, subsets: label spaces.
        object_in_json: "index" or "name".
        skipped: (path, reason) that the layout set aside.
        sources: how many images. sha256: of the plan's lines.
        tasks: the shards.
        notes: what the codec policy cannot hide, a line each.
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
    tasks: list[ShardSpec]
    notes: tuple[str, ...] = ()  # plans of earlier versions have none


def _shuffle_key(seed: int, path: str) -> bytes:
    # A hash, not a random generator: the permutation must not change with a library.
    return hashlib.blake2b(f"{seed}:{path}".encode("utf-8", "surrogateescape"), digest_size=16).digest()


def _spool(layout: Layout, folder: Path, seed: int) -> tuple[Counter[str], set[str]]:
    """Deal the records out into files by split and first bits of the rank.

    Each file is small enough to be sorted in memory: 1/64 of a split.

    Returns:
        how many records each generator has, and their subsets.
    """
    counts: Counter[str] = Counter()
    subsets = set()
    files: dict[str, BinaryIO] = {}
    with ExitStack() as stack:
        for record in layout.records():
            rank = _shuffle_key(seed, record.path).hex()
            name = _spool_name(record.split, int(rank[:2], 16) * _SPOOLS // 256)
            if name not in files:
                files[name] = stack.enter_context(open(folder / name, "wb"))
            line = json.dumps([record.path, record.generator, record.object, record.subset])
            files[name].write(f"{rank}{line}\n".encode())
            subsets.add(record.subset)
            counts[record.generator] += 1
    return counts, subsets


def _spool_name(split: str, number: int) -> str:
    return f"{split}-{number:02d}"


def _ordered(folder: Path, split: str) -> Iterator[bytes]:
    """A split's plan lines by rank."""
    for number in range(_SPOOLS):
        path = folder / _spool_name(split, number)
        if path.exists():
            lines = path.read_bytes().splitlines(keepends=True)
            lines.sort(key=lambda line: line[:_RANK_DIGITS])
            yield from (line[_RANK_DIGITS:] for line in lines)


def make_plan(
    layout: Layout,
    work: Path,
    policy: CodecPolicy,
    settings: dict[str, Any],
    *,
    allow_one_class: bool = False,
) -> ShardPlan:
    """List the sources, permute them inside their splits, cut them into shards; write it down.

    Needs little memory however many sources there are: they are sorted in pieces, on disk.

    Raises:
        UserError: see `Layout.records`; or there are no photographs, or nothing else, and that is not
            allowed. OSError: `work` cannot be written.
    """
    seed, samples_per_shard = settings["seed"], settings["samples_per_shard"]
    digest, tasks, offset, key = hashlib.sha256(), [], 0, 0
    with TemporaryDirectory(dir=work, prefix="plan-") as name:
        spools = Path(name)
        counts, subsets = _spool(layout, spools, seed)
        if not allow_one_class:
            require_both_classes(layout, counts)
        with open(spools / PLAN_LINES, "wb") as file:
            for split in SPLITS:
                ordered, number = _ordered(spools, split), 0
                while chunk := list(islice(ordered, samples_per_shard)):
                    tasks.append(ShardSpec(split, number, key, len(chunk), offset))
                    for line in chunk:
                        digest.update(line)
                        offset += file.write(line)
                    key, number = key + len(chunk), number + 1
        (spools / PLAN_LINES).rename(work / PLAN_LINES)
    # A checkpoint's policy brings the histogram it was trained with.
    notes: tuple[str, ...] = ()
    if policy.match_history and policy.history is None:

        def lines(split: str) -> Iterator[tuple[str, str]]:
            for task in tasks:
                if task.split == split:
                    yield from (line[:2] for line in read_task(work, task))

        history, notes = find_history(layout, lines, partial(_shuffle_key, seed))
        policy = replace(policy, history=history)
    plan = ShardPlan(
        settings,
        policy,
        tuple(layout.generators),
        tuple(layout.objects),
        tuple(sorted(subsets)),
        layout.object_in_json,
        sorted([path, reason] for path, reason in layout.skipped),
        counts.total(),
        digest.hexdigest(),
        tasks,
        notes,
    )
    head = {**vars(plan), "policy": policy.to_dict(), "tasks": [vars(task) for task in tasks]}
    write_text(work / PLAN_HEAD, json.dumps(head))
    return plan


def read_plan(work: Path) -> ShardPlan | None:
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
    head["tasks"] = [ShardSpec(**task) for task in head["tasks"]]
    for name in ("generators", "objects", "subsets", "notes"):
        head[name] = tuple(head.get(name, ()))
    return ShardPlan(**head)


def read_task(work: Path, task: ShardSpec) -> Iterator[tuple[str, str, int | None, str]]:
    """(path, generator, object, subset) of a shard's sources, in order."""
    with open(work / PLAN_LINES, "rb") as file:
        file.seek(task.offset)
        for _ in range(task.count):
            path, generator, label, subset = json.loads(file.readline())
            yield path, generator, label, subset
