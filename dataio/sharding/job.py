"""Writing shards: from a layout's sources to tars, their indexes and the manifest.

A shard is committed by its sidecar in OUTPUT/.work, renamed into place after the tar and
its index are on disk; a restart skips committed shards and writes the others again, byte
for byte the same. Nothing in the result depends on the clock, the host, the number of
workers, or the number of tasks that share the work.
"""

import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import IO, Any

from dataio.core.errors import UserError, reason_of
from dataio.core.locks import alone, is_held, locked
from dataio.core.progress import ProgressBar
from dataio.core.tasks import ArrayTask, check_settings
from dataio.images.codec import CodecPolicy
from dataio.layouts.base import SPLITS, Layout
from dataio.sharding.disk_space import check_space
from dataio.sharding.merge import finish_folder
from dataio.sharding.plan import ShardPlan, ShardSpec, make_plan, read_plan
from dataio.sharding.workers import run_tasks
from dataio.sharding.writer import WORK, read_sidecar
from dataio.shards.manifest import read_manifest

_NAMED_TASKS = 50
_CREATED = "created"  # in the work folder: its output folder was made by us too


@dataclass(frozen=True)
class ShardJob:
    """What to shard, how, and where to.

    Attributes:
        layout: the sources. output: the folder. policy: from `preset_policy`.
        workers: processes; the bytes are the same for any number.
        samples_per_shard: at most, and exactly but for rejected files and the last shard.
        seed: of the permutation.
        extra_settings: the layout's options, so that a rerun with others is refused.
        quiet: no progress.
        allow_duplicates: the same picture may be in two splits; reported only.
        allow_one_class: there may be no photographs, or nothing else.

    Raises:
        UserError: a number below 1.
    """

    layout: Layout
    output: Path
    policy: CodecPolicy
    workers: int = 1
    samples_per_shard: int = 1000
    seed: int = 0
    extra_settings: dict[str, Any] = field(default_factory=dict)
    quiet: bool = False
    allow_duplicates: bool = False
    allow_one_class: bool = False

    def __post_init__(self) -> None:
        if self.workers < 1 or self.samples_per_shard < 1:
            field = "workers" if self.workers < 1 else "samples_per_shard"
            raise UserError("expected at least 1", field=field, value=getattr(self, field))

    @property
    def settings(self) -> dict[str, Any]:
        """Everything the bytes depend on, except the source."""
        return {
            "layout": self.layout.name,
            "codec": self.policy.to_dict(),  # with a history only where one was given, not found
            "samples_per_shard": self.samples_per_shard,
            "seed": self.seed,
            **self.extra_settings,
        }

    @property
    def work(self) -> Path:
        return self.output / WORK


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
    allow_duplicates: bool = False,
    allow_one_class: bool = False,
) -> dict[str, Any]:
    """Write, or finish writing, a shard folder: `run_job` of the `ShardJob` of these arguments."""
    return run_job(
        ShardJob(
            layout,
            Path(output),
            policy,
            workers=workers,
            samples_per_shard=samples_per_shard,
            seed=seed,
            extra_settings=extra_settings or {},
            quiet=quiet,
            allow_duplicates=allow_duplicates,
            allow_one_class=allow_one_class,
        )
    )


def run_job(job: ShardJob) -> dict[str, Any]:
    """Write every missing shard, and finish.

    Returns:
        the manifest; the existing one where the folder is finished already.

    Raises:
        UserError: the folder is in use, holds something else, was begun with other
            settings, cannot be written; nothing usable in the source.
    """
    if (manifest := _finished(job)) is not None:
        return manifest
    with _folder(job) as lock:
        if (manifest := _finished(job)) is not None:  # by the process that held it
            return manifest
        plan = _plan(job, lock)
        _check_space(job, plan, lock)
        _write(job, plan, plan.tasks, "")
        with _disk_errors(job):
            manifest = _finish(job, plan)
    shutil.rmtree(job.work, ignore_errors=True)
    return manifest


def run_array_task(job: ShardJob, array_task: ArrayTask) -> str:
    """Write one task's shards; any number of tasks may run at once, on any machines.

    Returns:
        what was done, in a line.

    Raises:
        UserError: as `run_job`; or the same task is running already.
    """
    finished = f"task {array_task}: {job.output} is finished already"
    if _finished(job) is not None:
        return finished
    with _folder(job, shared=True) as lock:
        if _finished(job) is not None:
            return finished
        plan = _plan(job, lock)
        _check_space(job, plan, lock)
        try:
            with locked(job.work / f"task-{array_task.label}.lock") as task_lock:
                os.utime(task_lock.fileno())  # the newest lock tells `finish_job` the number of tasks
                tasks = array_task.among(plan.tasks)
                _write(job, plan, tasks, array_task.label)
        except BlockingIOError:
            raise UserError(
                "another process is running it; wait for it or stop it", field="task", value=array_task
            ) from None
        missing = sum(read_sidecar(job.output, task) is None for task in plan.tasks)
        then = f"{missing} of {len(plan.tasks)} are missing" if missing else "all are there: now --finish"
        return f"task {array_task}: {len(tasks)} shards, {sum(task.count for task in tasks)} sources; {then}"


def finish_job(job: ShardJob) -> dict[str, Any]:
    """Merge the tasks' shards and return the manifest. Any number of processes may try at once.

    Raises:
        UserError: shards are missing (their tasks are named), or as `run_job`.
    """
    try:
        return _merge(job)
    except UserError:
        # Another process may have merged meanwhile, and removed what this one read.
        if (manifest := _finished(job)) is None:
            raise
        return manifest


def _merge(job: ShardJob) -> dict[str, Any]:
    if (manifest := _finished(job)) is not None:
        return manifest
    plan = read_plan(job.work)
    if plan is None:
        raise UserError(f"{job.output} has no plan and no shards; run the tasks first", field="finish")
    _check_settings(job, plan.settings, {**job.settings, "source": job.layout.root})
    _check_complete(job, plan)
    # All shards are written: whoever holds the folder is about to leave it, or merges too.
    waiting = f"{job.output}: another process is leaving it; waiting for it"
    with _folder(job, wait=waiting), _disk_errors(job):
        manifest = _finished(job) or _finish(job, plan)
    shutil.rmtree(job.work, ignore_errors=True)
    return manifest


def _finish(job: ShardJob, plan: ShardPlan) -> dict[str, Any]:
    return finish_folder(job.layout, job.output, plan, allow_duplicates=job.allow_duplicates)


def _check_complete(job: ShardJob, plan: ShardPlan) -> None:
    """Raise a UserError that names the tasks whose shards are missing."""
    missing = [n for n, task in enumerate(plan.tasks) if read_sidecar(job.output, task) is None]
    if not missing:
        return
    counted = f"{len(missing)} of {len(plan.tasks)} shards of {job.output} are missing"
    locks = sorted(job.work.glob("task-*-of-*.lock"), key=lambda path: path.stat().st_mtime_ns)
    if not locks:
        raise UserError(
            f"{counted} and no task was ever started; run the tasks, or write without finish", field="finish"
        )
    of = int(locks[-1].stem.rpartition("-")[2])
    named = []
    for number, shards in sorted(Counter(n % of for n in missing).items()):
        array_task = ArrayTask(number, of)
        lock = job.work / f"task-{array_task.label}.lock"
        state = ", running" if lock.exists() and is_held(lock) else ""
        named.append(f"{array_task} ({shards} shard{'s' if shards > 1 else ''}{state})")
    more = f" and {len(named) - _NAMED_TASKS} more" if len(named) > _NAMED_TASKS else ""
    raise UserError(
        f"{counted}, of task {', '.join(named[:_NAMED_TASKS])}{more}; run those again, then finish",
        field="finish",
    )


def _check_settings(job: ShardJob, stored: dict[str, Any], settings: dict[str, Any]) -> None:
    """Raise a UserError where the folder was begun with other settings.

    A folder of an earlier version goes on with its own policy where that lacks a key.
    """
    codec = {**settings["codec"], **stored.get("codec", {})}
    check_settings(job.output, {**stored, "codec": codec}, settings)


def _finished(job: ShardJob) -> dict[str, Any] | None:
    """The manifest of a finished folder; None where it is not.

    Raises:
        UserError: it was made with other settings.
    """
    if not (job.output / "manifest.json").is_file():
        return None
    manifest = read_manifest(job.output)
    _check_settings(job, manifest["plan"], job.settings)
    shutil.rmtree(job.work, ignore_errors=True)  # killed between the manifest and this
    return manifest


@contextmanager
def _folder(job: ShardJob, shared: bool = False, wait: str = "") -> Iterator[IO[str]]:
    """Lock the output folder: exclusively, or shared with other tasks; `wait`: see `locked`."""
    output = job.output
    if output.is_dir() and any(output.iterdir()) and not job.work.is_dir():
        raise UserError("holds something else; choose an empty or new folder", field="output", value=output)
    with ExitStack() as stack:
        try:
            lock = stack.enter_context(_work_lock(job, shared, wait))
        except BlockingIOError:
            raise UserError(
                "another process is writing it; wait for it or stop it", field="output", value=output
            ) from None
        except OSError as error:
            raise UserError(
                f"cannot be written ({reason_of(error)}); choose another", field="output", value=output
            ) from None
        yield lock


@contextmanager
def _work_lock(job: ShardJob, shared: bool, wait: str) -> Iterator[IO[str]]:
    for attempt in count():
        created = not job.output.exists()
        job.work.mkdir(parents=True, exist_ok=True)
        if created:
            (job.work / _CREATED).touch()
        try:
            stack = ExitStack()
            lock = stack.enter_context(locked(job.work / "lock", shared=shared, wait=wait))
        except FileNotFoundError:  # another process failed to plan just now and removed the folder
            if attempt == 9:
                raise
            continue
        with stack:
            yield lock
        return


def _plan(job: ShardJob, lock: IO[str]) -> ShardPlan:
    """Read the plan or make it; of several tasks that start at once, one makes it."""
    settings = {**job.settings, "source": job.layout.root}
    waiting = f"{job.output}: another task is making the plan; waiting for it"
    with _disk_errors(job), locked(job.work / "plan.lock", wait=waiting):
        plan = read_plan(job.work)
        if plan is not None:
            _check_settings(job, plan.settings, settings)
            return plan
        for leftover in job.work.glob("plan-*"):
            shutil.rmtree(leftover)
        try:
            return make_plan(job.layout, job.work, job.policy, settings, allow_one_class=job.allow_one_class)
        except UserError:
            _withdraw(job, lock)
            raise


def _withdraw(job: ShardJob, lock: IO[str]) -> None:
    """Remove what a job that cannot start has written, unless other processes use it."""
    if alone(lock):
        created = (job.work / _CREATED).exists()
        shutil.rmtree(job.work)
        if created:
            with suppress(OSError):  # a run before this one was killed and left something
                job.output.rmdir()


def _check_space(job: ShardJob, plan: ShardPlan, lock: IO[str]) -> None:
    """Raise a UserError where the disk has no room for all missing shards, of this task and others."""
    todo = [task for task in plan.tasks if read_sidecar(job.output, task) is None]
    try:
        check_space(job.output, plan, todo, job.layout.source)
    except UserError:
        if len(todo) == len(plan.tasks):
            _withdraw(job, lock)
        raise


def _write(job: ShardJob, plan: ShardPlan, tasks: Sequence[ShardSpec], label: str) -> None:
    """Write the missing shards; `label` marks a task's own temporary files."""
    with _disk_errors(job):
        for split in SPLITS:
            (job.output / split).mkdir(exist_ok=True)
        for folder in (*(job.output / split for split in SPLITS), job.work):
            for leftover in folder.glob(f".*.{label}.tmp" if label else ".*.tmp"):
                leftover.unlink()
        todo = [task for task in tasks if read_sidecar(job.output, task) is None]
        total = sum(task.count for task in tasks)
        progress = ProgressBar(total, total - sum(task.count for task in todo), job.quiet)
        for task in run_tasks(job.output, plan, job.layout.source, todo, job.workers, label):
            progress.advance(task.count)
        progress.close()


@contextmanager
def _disk_errors(job: ShardJob) -> Iterator[None]:
    """Turn an OSError of the output folder into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{reason_of(error)}; fix that and run the same again", field="output", value=job.output
        ) from None
