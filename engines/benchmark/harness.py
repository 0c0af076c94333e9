"""Time benchmark cases interleaved (ABAB), each in a process of its own.

A case is set up once, warmed by one run that is reported as cold, and then alternates with the
others, so that a slowdown of the machine affects all of them. A process of its own separates the
case's memory and processor time.
"""

import multiprocessing
import os
import statistics
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from dataio.core.errors import UserError
from engines.benchmark.case import BenchmarkSettings, Group, Result, Run, Unavailable
from engines.benchmark.registry import GROUPS

# ---- the child --------------------------------------------------------------------------


def _serve(connection: Connection, group: str, case: str, settings: BenchmarkSettings) -> None:
    torch.set_num_threads(1)
    os.dup2(2, 1)  # output of libraries must not mix with the table
    try:
        # By name: cases are closures, which cannot be sent to another process.
        with GROUPS[group].cases[case](settings) as once:
            connection.send("ready")
            while connection.recv() == "go":
                begin = family_cpu_seconds()
                run = once()
                connection.send((run, family_cpu_seconds() - begin, family_peak_mib(os.getpid())))
    except EOFError:
        pass  # the parent is gone
    except Unavailable as error:
        connection.send(f"unavailable: {error}")
    except UserError as error:
        connection.send(f"error: {error}")
    except Exception:
        connection.send(f"error: {traceback.format_exc()}")


def lines_of(path: str) -> Iterator[str]:
    """The lines of a file; none if it cannot be read."""
    try:
        yield from Path(path).read_text().splitlines()
    except OSError:
        return


def family(root: int) -> list[Path]:
    """The /proc folders of a process and of its descendants."""
    folders, todo = [], [root]
    while todo:
        folder = Path(f"/proc/{todo.pop()}")
        try:
            todo += [
                int(child)
                for task in (folder / "task").iterdir()
                for child in (task / "children").read_text().split()
            ]
        except OSError:
            continue
        folders.append(folder)
    return folders


def family_cpu_seconds() -> float:
    """Processor time of this process and its descendants, ended ones included; seconds."""
    ticks = 0
    for folder in family(os.getpid()):
        try:
            # user, system, and both of children that were waited for: proc(5).
            ticks += sum(map(int, (folder / "stat").read_text().rpartition(")")[2].split()[11:15]))
        except OSError:
            continue
    return ticks / os.sysconf("SC_CLK_TCK")


def family_peak_mib(root: int) -> float:
    """Peak resident memory of the largest of a process and its descendants; MiB.

    VmHWM and not ru_maxrss, which starts at the parent's value.
    """
    marks = [
        int(line.split()[1])
        for folder in family(root)
        for line in lines_of(str(folder / "status"))
        if line.startswith("VmHWM")
    ]
    return max(marks, default=0) / 1024


class _Child:
    def __init__(self, group: Group, name: str, settings: BenchmarkSettings) -> None:
        self.name = name
        spawning = multiprocessing.get_context("spawn")
        self._connection, theirs = spawning.Pipe()
        # Not a daemon: cases have worker processes of their own.
        self._process = spawning.Process(target=_serve, args=(theirs, group.name, name, settings))
        self._process.start()
        theirs.close()
        self._what = f"{group.name} {name}: setup failed"

    def ready(self) -> None:
        """Wait until the case is set up.

        Raises:
            Unavailable: the case cannot run here. RuntimeError: it failed.
        """
        self._expect(self._what)

    def _expect(self, what: str) -> Any:
        try:
            answer = self._connection.recv()
        except EOFError:
            answer = f"error: its process ended with code {self._process.exitcode}"
        if isinstance(answer, str) and answer.startswith("unavailable: "):
            raise Unavailable(answer.removeprefix("unavailable: "))
        if isinstance(answer, str) and answer.startswith("error: "):
            raise RuntimeError(f"{what}: {answer.removeprefix('error: ')}")
        return answer

    def once(self) -> tuple[Run, float, float]:
        self._connection.send("go")
        return self._expect(f"{self.name}: a run failed")

    def end(self) -> None:
        with suppress(OSError):
            self._connection.send("stop")
        self._process.join(30)
        self._process.kill()
        self._process.join()


# ---- the parent -------------------------------------------------------------------------


def run_group(
    group: Group, settings: BenchmarkSettings, repeats: int, say: Callable[[str], None]
) -> list[Result]:
    """Run a group's cases interleaved.

    Args:
        repeats: timed runs of each case, after the cold one. say: receives progress messages.

    Returns:
        one result for each case that is not `Unavailable`, in the group's order.

    Raises:
        RuntimeError: a case failed.
    """
    results: list[Result] = []
    one_by_one = group.alone and settings.device == "cuda"
    for names in [[name] for name in group.cases] if one_by_one else [list(group.cases)]:
        results += _interleave(group, names, settings, repeats, say)
    return results


def _interleave(
    group: Group, names: Sequence[str], settings: BenchmarkSettings, repeats: int, say: Callable[[str], None]
) -> list[Result]:
    children: list[_Child] = []
    runs: dict[str, list[tuple[Run, float, float]]] = {name: [] for name in names}
    try:
        # Set up in parallel, since most of it is importing; run one at a time.
        children += [_Child(group, name, settings) for name in names]
        for child in list(children):
            try:
                child.ready()
            except Unavailable as reason:
                say(f"{group.name}: without {child.name}: {reason}")
                children.remove(child)
                child.end()
        for turn in range(repeats + 1):
            for child in children:
                runs[child.name].append(child.once())
            if children:
                say(f"{group.name}: {'cold run' if turn == 0 else f'run {turn} of {repeats}'} done")
    finally:
        for child in children:
            child.end()
    return [_result(group, child.name, runs[child.name]) for child in children]


def _result(group: Group, name: str, runs: Sequence[tuple[Run, float, float]]) -> Result:
    (cold, _, _), warm = runs[0], runs[1:]
    images = sum(run.images + run.untimed for run, _, _ in warm)
    extra = {key: statistics.median(run.extra[key] for run, _, _ in warm) for key in sorted(warm[0][0].extra)}
    return Result(
        group=group.name,
        case=name,
        unit=group.unit,
        cold=cold.images / cold.seconds,
        rates=[run.images / run.seconds for run, _, _ in warm],
        megabytes_per_second=statistics.median(run.bytes / run.seconds / 1e6 for run, _, _ in warm),
        cpu_seconds_per_image=sum(cpu for _, cpu, _ in warm) / max(1, images),
        peak_mib=max(peak for _, _, peak in runs),
        extra=extra,
    )
