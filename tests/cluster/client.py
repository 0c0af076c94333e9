"""A test cluster as tests use it: started, given commands, stopped."""

import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.cluster.supervisor import KIT
from tests.support import environment

ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "DEADLINE")


class Cluster:
    """A cluster of its own in a new short folder under /tmp, gone with `stop` or with this process.

    Jobs are submitted from `work` where nothing else is said. They get this Python's virtual
    environment as TELLTALE_VENV and a TMPDIR of the cluster's own: torchrun leaves folders there
    when it is killed. Timings never fail a test; every `seconds` is a generous limit.
    """

    def __init__(self, *options: str) -> None:
        # Short: a Unix socket's path has at most 107 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="telltale-slurm-", dir="/tmp"))
        self.work, self.temporary = self.folder / "work", self.folder / "tmp"
        self.work.mkdir()
        self.temporary.mkdir()
        with open(self.folder / "supervisor.log", "wb") as log:
            self.process = subprocess.Popen(
                [*KIT, "serve", str(self.folder), "--until-stdin-eof", *options],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self.process.stdout is not None
        if self.process.stdout.readline().strip() != "READY":
            said = (self.folder / "supervisor.log").read_text()
            raise RuntimeError(f"the cluster did not start, see {self.folder}: {said}")
        self.nodes = self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%N").split()

    def stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)
        shutil.rmtree(self.folder)

    def variables(self, changes: dict[str, str] | None = None) -> dict[str, str]:
        """The environment of commands and of the jobs that they submit."""
        clean = {
            k: v
            for k, v in environment().items()
            if not k.startswith(("SLURM", "SBATCH", "SRUN", "TELLTALE", "NCCL_", "GLOO_"))
        }
        own = {"TELLTALE_VENV": sys.prefix, "TMPDIR": str(self.temporary)}
        return {**clean, **own, **(changes or {})}

    def call(
        self, *words: object, env: dict[str, str] | None = None, cwd: Path | None = None, seconds: float = 120
    ) -> subprocess.CompletedProcess[str]:
        """Run a command inside the cluster, whatever its exit code."""
        return subprocess.run(
            [*KIT, "run", str(self.folder), "--", *map(str, words)],
            capture_output=True,
            text=True,
            timeout=seconds,
            cwd=cwd or self.work,
            env=self.variables(env),
        )

    def run(self, *words: object, env: dict[str, str] | None = None, cwd: Path | None = None) -> str:
        """Run a command that must succeed; returns what it printed."""
        done = self.call(*words, env=env, cwd=cwd)
        assert done.returncode == 0, f"{words}: exit code {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout.strip()

    def sbatch(self, *words: object, env: dict[str, str] | None = None, cwd: Path | None = None) -> str:
        """Submit; returns the job's id."""
        return self.run("sbatch", "--parsable", *words, env=env, cwd=cwd)

    def job(self, job: str) -> dict[str, str]:
        """The fields of `scontrol show job` (JobState, Restarts, ExitCode, Reason, ...)."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "-o", "show", "job", job)))

    def tasks(self, job: str) -> dict[int, dict[str, str]]:
        """The same for each started task of an array, by its number."""
        shown = self.run("scontrol", "-o", "show", "job", job).splitlines()
        fields = [dict(re.findall(r"(\w+)=(\S*)", line)) for line in shown]
        return {int(f["ArrayTaskId"]): f for f in fields if f["ArrayTaskId"].isdigit()}

    def wait_array(self, job: str, count: int, seconds: float = 240) -> dict[int, dict[str, str]]:
        """Wait until all tasks of an array have ended; returns their fields."""

        def ended() -> bool:
            tasks = self.tasks(job)
            return len(tasks) == count and all(task["JobState"] in ENDED for task in tasks.values())

        self.until(ended, f"the end of {count} tasks", job, seconds)
        return self.tasks(job)

    def state(self, job: str) -> str:
        return self.job(job)["JobState"]

    def log(self, job: str) -> str:
        """What a job, or all started tasks of an array, have printed so far."""
        shown = self.run("scontrol", "-o", "show", "job", job)
        files = [Path(name) for name in sorted(set(re.findall(r"StdOut=(\S+)", shown)))]
        return "".join(file.read_text(errors="replace") for file in files if file.exists())

    def until(self, condition: Callable[[], object], what: str, job: str = "", seconds: float = 180) -> None:
        """Wait for a condition; a failure shows the job and what it printed."""
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                about = f"{self.job(job)}\n{self.log(job)}" if job else ""
                raise AssertionError(f"waited {seconds} s in vain for {what}\n{about}")
            time.sleep(0.1)

    def wait(self, job: str, states: Sequence[str] = ENDED, seconds: float = 240) -> str:
        """Wait until a job is in one of these states; returns it."""
        seen: list[str] = []

        def there() -> bool:
            seen.append(self.state(job))
            return seen[-1] in states

        self.until(there, f"job {job} in {', '.join(states)}", job, seconds)
        return seen[-1]

    def wait_log(self, job: str, text: str, seconds: float = 180) -> None:
        """Wait until a job has printed something; fails at once when it ends without."""

        def there() -> bool:
            ended = self.state(job) in ENDED
            if text in self.log(job):
                return True
            assert not ended, f"job {job} ended without {text!r}\n{self.log(job)}"
            return False

        self.until(there, f"{text!r} in the log of job {job}", job, seconds)

    def restarts(self, job: str) -> int:
        return int(self.job(job)["Restarts"])

    def kill_node(self, name: str) -> None:
        """Cut the node's power and say so: slurmctld itself would notice after some 20 s."""
        self._kit("kill-node", name)
        self.run("scontrol", "update", f"nodename={name}", "state=down", "reason=power")

    def start_node(self, name: str) -> None:
        self._kit("start-node", name)

    def clear(self) -> None:
        """Cancel every job and wait until all nodes are idle; restarts those that were killed."""
        self.run("scancel", "--me")
        for name in self.nodes:
            self.start_node(name)

        def idle() -> bool:
            shown = self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%t").split()
            return shown == ["idle"] * len(self.nodes)

        self.until(lambda: idle() and not self.run("squeue", "-h", "--me"), "idle nodes")

    def _kit(self, *words: str) -> None:
        verb, *rest = words
        subprocess.run([*KIT, verb, str(self.folder), *rest], check=True, capture_output=True, timeout=90)
