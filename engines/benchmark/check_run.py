"""A check of one GPU or of several: parts one after the other, each a process with a time limit, and the JSON file.

The file is written after every part. A part that fails, or is stopped at its limit, leaves the others;
the results of a later check replace those of the parts that it ran.
"""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from dataio.core.atomic import write_text
from dataio.core.errors import UserError, one_line, writing
from engines.benchmark.case import BenchmarkSettings
from engines.benchmark.check_parts import (
    DATA,
    DEADLINE,
    MULTI_GPU,
    ONE_GPU,
    CheckKind,
    CheckPart,
    chosen_parts,
)
from engines.benchmark.check_report import CheckTask, encode_task
from engines.benchmark.document import machine, versions
from engines.benchmark.goals import goals_table, in_words, judge
from engines.benchmark.harness import family
from engines.runtime.paths import ROOT
from engines.runtime.versions import commit_of, version_of

_VERSION = 1
# A CPU is here to see that all of it works.
_CPU_SLACK = 8
_LEAST = 10.0  # seconds without which a part is not begun
Say = Callable[[str], None]


@dataclass(frozen=True)
class CheckPlan:
    """What `run_check` is asked for.

    Attributes:
        parts: names with commas, "" for all. data: folder of the images, drawn where missing.
        cifake: folder of CIFAKE's shards, "" for none. workers: processes or threads, 0 for the cores, at most 16.
        tiny: few images, short windows. commit: the code's, where it cannot be seen.
        output: JSON file, which may hold earlier results, "" for none.
        gpus: for a check of several GPUs, how many (processes on a CPU); 0 for the check of one.
    """

    parts: str
    device: str
    data: str
    cifake: str = ""
    workers: int = 0
    tiny: bool = False
    commit: str = ""
    output: str = ""
    gpus: int = 0

    @property
    def kind(self) -> CheckKind:
        """Which check this is."""
        return MULTI_GPU if self.gpus else ONE_GPU


def run_check(plan: CheckPlan, say: Say, *, deadline: float = DEADLINE) -> int:
    """Run the parts.

    Args:
        say: receives every figure as it comes, and the table at the end.
        deadline: seconds after which no part goes on, on a GPU.

    Returns:
        1 where a part failed or was not run, or a floor is missed, else 0.

    Raises:
        UserError: a name that is not a part, no GPU, a file of another machine or one that cannot be written.
    """
    kind = plan.kind
    parts = chosen_parts(plan.parts, kind.parts)
    if plan.device == "cuda" and not torch.cuda.is_available():
        raise UserError("PyTorch sees no GPU here; use cpu", field="device", value="cuda")
    slack = 1.0 if plan.device == "cuda" else _CPU_SLACK
    task = _task(plan)
    written = _document(plan, task)
    end = time.monotonic() + deadline * slack
    if {part.name for part in parts} - kind.blind or (plan.tiny and kind is ONE_GPU):
        parts = _with_data(task, parts)
    for part in parts:
        left = end - time.monotonic()
        if left < _LEAST:
            say(f"{part.name}: not run, the check has taken {deadline * slack:.0f} s")
            record = {"status": "not run", "seconds": 0.0, "figures": {}, "errors": {}}
            written["parts"].setdefault(part.name, record)
        else:
            record = _run_part(part, task, min(left, part.limit * slack), say)
            written["parts"][part.name] = {"commit": written["commit"], **record}
        judged = plan.device == "cuda" and not plan.tiny
        if kind is ONE_GPU:  # several have no goals yet
            written["goals"] = judge(_figures(written), judged=judged)
        if plan.output:
            write_text(Path(plan.output), json.dumps(written, indent=1) + "\n")
    if written["goals"]:
        say("\n" + goals_table(written["goals"]))
    ran = [written["parts"][part.name] for part in parts]
    bad = any(part["status"] != "done" for part in ran)
    return 1 if bad or any(row["met"] == "no" for row in written["goals"]) else 0


def _task(plan: CheckPlan) -> CheckTask:
    workers = plan.workers or min(16, len(os.sched_getaffinity(0)))
    size: dict[str, Any] = (
        {"images": 150, "batch": 16, "seconds": 0.1} if plan.tiny else {"images": 2000, "batch": 256}
    )
    # An epoch must hold a step of all GPUs.
    size["images"] = max(size["images"], 2 * size["batch"] * plan.gpus)
    values = {"small": 400, "seconds": 1.5, **size}
    folder = Path(plan.data).resolve() / f"{values['images']}-{values['small']}"
    settings = BenchmarkSettings(folder=str(folder), device=plan.device, workers=workers, **values)
    cifake = str(Path(plan.cifake).resolve()) if plan.cifake else ""
    return CheckTask(settings, plan.tiny, 1 if plan.tiny else 2, cifake, plan.gpus)


def _with_data(task: CheckTask, parts: Sequence[CheckPart]) -> list[CheckPart]:
    folder = Path(task.settings.folder)
    drawn = all((folder / f"{name}-files" / "labels.json").is_file() for name in ("large", "small"))
    return list(parts) if drawn else [DATA, *parts]


# ---- the file -----------------------------------------------------------------------------------


def _document(plan: CheckPlan, task: CheckTask) -> dict[str, Any]:
    """The file as it is before the first part: earlier parts, and the machine as it is now."""
    settings = {key: value for key, value in asdict(task.settings).items() if key not in ("folder", "limits")}
    new = {
        "schema": plan.kind.schema,
        "version": _VERSION,
        "machine": {**machine(), "driver": _driver() if plan.device == "cuda" else None},
        "versions": versions(),
        "commit": commit_of() or plan.commit,
        "command": " ".join(["python", *[os.path.relpath(sys.argv[0]), *sys.argv[1:]]]),
        "settings": {**settings, "tiny": plan.tiny, **({"gpus": plan.gpus} if plan.gpus else {})},
        "parts": {},
        "goals": [],
    }
    path = Path(plan.output)
    if not plan.output:
        return new
    if not path.exists():
        # Before anything is measured.
        with writing(f"--output {path}", hint="give another name"):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(new, indent=1) + "\n")
        return new
    try:
        old = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--output {path}: cannot be read ({one_line(error)[:200]})") from None
    if not isinstance(old, dict) or old.get("schema") != plan.kind.schema:
        raise UserError(f"--output {path}: is not the file of a {plan.kind.title}; give another name")
    for part, key in (
        ("machine", "gpu"),
        ("machine", "processor"),
        ("settings", "tiny"),
        ("settings", "device"),
        ("settings", "gpus"),
    ):
        before, now = old[part].get(key), new[part].get(key)  # type: ignore[attr-defined]
        if before != now:
            raise UserError(
                f"--output {path}: its {key} is {before!r}, here it is {now!r}; "
                "results of two machines do not merge, give another name"
            )
    new["parts"] = old["parts"]
    return new


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else None


def _figures(written: dict[str, Any]) -> dict[tuple[str, str], float]:
    return {
        (part, name): figure["value"]
        for part, record in written["parts"].items()
        for name, figure in record["figures"].items()
    }


# ---- one part -------------------------------------------------------------------------------------


def _run_part(part: CheckPart, task: CheckTask, limit: float, say: Say) -> dict[str, Any]:
    """Run a part in a process group of its own; its record for the file."""
    say(f"{part.name}: {part.what} (at most {limit:.0f} s)")
    record: dict[str, Any] = {
        "status": "done",
        "seconds": 0.0,
        "limit": limit,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: version_of(name) for name in ("torch", "nvidia-dali-cuda130")},
        "figures": {},
        "errors": {},
    }
    logs = Path(task.settings.folder) / "check-logs"
    logs.mkdir(parents=True, exist_ok=True)
    log, begin = logs / f"{part.name}.log", time.monotonic()
    reading, writing = os.pipe()
    environment = {**os.environ, **({} if task.settings.device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""})}
    command = [sys.executable, "-m", "engines.benchmark.check_child", part.name, str(writing)]
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [*command, encode_task(task)],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=[writing],
            start_new_session=True,
        )
    os.close(writing)
    try:
        in_time = _listen(process, reading, begin + limit, lambda line: _note(part, line, record, say))
    finally:
        _end(process)
    record["seconds"] = round(time.monotonic() - begin, 1)
    if not in_time:
        record["status"] = "timed out"
        record["errors"][part.name] = f"stopped after {limit:.0f} s"
    elif process.returncode:
        record["errors"][part.name] = f"its process ended with code {process.returncode}: {_tail(log)}"
    if record["errors"] and in_time:
        record["status"] = "failed"
    for what, error in record["errors"].items():
        last = (error.strip().splitlines() or [""])[-1]
        say(f"{part.name}: {what}: {record['status']}: {last} (log: {log})")
    say(f"{part.name}: {record['status']} after {record['seconds']:.0f} s")
    return record


def _note(part: CheckPart, text: str, record: dict[str, Any], say: Say) -> None:
    line = json.loads(text)
    if "failed" in line:
        record["errors"][line["failed"]] = line["error"]
        return
    name = line.pop("figure")
    record["figures"][name] = line
    how = f" ({line['how']})" if "how" in line else ""
    say(f"{part.name}: {name}: {in_words(line['value'], line['unit'])}{how}")


def _listen(process: Any, reading: int, end: float, note: Callable[[str], None]) -> bool:
    """Pass on what a process reports until it ends; False: it did not in time."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        with os.fdopen(reading) as stream:
            for line in stream:
                lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            line = lines.get(timeout=0.1)
        except queue.Empty:
            line = ""
        if line:
            note(line)
        elif line is None or process.poll() is not None:
            break
        if time.monotonic() > end:
            return False
    # The stream may end a little before the process, and later where another holds it.
    try:
        process.wait(max(0.1, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        return False
    while not lines.empty():
        if rest := lines.get():
            note(rest)
    return True


def _end(process: Any) -> None:
    """End a process, its group, and descendants that left the group."""
    others = [int(folder.name) for folder in family(process.pid) if folder.name != str(process.pid)]
    for sent in (signal.SIGTERM, signal.SIGKILL):
        for kill, pid in [(os.killpg, process.pid), *((os.kill, pid) for pid in others)]:
            try:
                kill(pid, sent)
            except (ProcessLookupError, PermissionError):
                continue
        if sent == signal.SIGTERM and process.poll() is None:
            time.sleep(1.0)
    process.wait()


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-400:].strip()
