"""Runs that are killed at random, over and over, each compared with one that was left alone.

    python tests/integration/faults/soak.py --minutes 30

Each run is started again until it has finished. Every start but the last of a run is disturbed:
by a fault at a random point, by SIGKILL to a random process (a rank, all of them, the launcher)
at a random time, or by SIGTERM. Prints a line for each run and figures at the end; exits with 1
if anything differed.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent.parent)

from engines.runtime import fault_injection as faults
from tests.integration.faults.harness import STEPS, Run, differing
from tests.support import alive, descendants, wait_until, write_tiny_shards

POINTS = [point for point in faults.POINTS if point not in ("step.forward", "metrics.write")]
MOST_STARTS = 12


def random_fault(chance: random.Random, processes: int) -> str:
    kind = chance.choice(["kill", "kill", "kill_all", "kill_launcher", "raise"])
    point = chance.choice(POINTS)
    rank = 0 if point.startswith(("checkpoint", "best", "export")) else chance.randrange(processes)
    return f"{kind}@{point}:step={chance.randrange(STEPS + 1)},rank={rank}"


def disturb(run: Run, processes: int, chance: random.Random) -> str:
    """Start the run and disturb it; says how. It may finish all the same."""
    if chance.random() < 0.6:
        how = random_fault(chance, processes)
        done = run.go(processes, how)
        return how if "fault: " in done.stderr else ""
    process = run.start(processes)
    with process:
        victim = chance.choice(["rank", "all", "launcher", "term"])
        deadline = time.monotonic() + chance.uniform(3.0, 16.0)
        while time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.02)
        children = descendants(process.pid)
        if process.poll() is not None or not children:
            process.communicate()
            return ""
        chosen = {"rank": [chance.choice(children)], "all": [process.pid, *children]}
        for pid in chosen.get(victim, [process.pid]):
            try:
                os.kill(pid, signal.SIGTERM if victim == "term" else signal.SIGKILL)
            except ProcessLookupError:
                continue
        try:
            process.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            process.kill()
            raise AssertionError(
                f"after SIGKILL to {victim} the launcher did not end in two minutes"
            ) from None
        wait_until(lambda: not any(map(alive, children)), 30, "the end of the launcher's processes")
    return "SIGTERM to the launcher" if victim == "term" else f"SIGKILL to {victim}"


def soak(run: Run, reference: Run, processes: int, chance: random.Random, count: "Counter[str]") -> list[str]:
    """One run, disturbed until it has finished; what differs from the reference."""
    for start in range(MOST_STARTS):
        if start == MOST_STARTS - 1 or chance.random() < 0.2:
            count["undisturbed starts"] += 1
            done = run.go(processes)
            if done.returncode != 0:
                return [f"a start that nobody disturbed failed: {done.stderr[-600:]}"]
        else:
            how = disturb(run, processes, chance)
            count["disturbed starts" if how else "starts that no fault met"] += 1
            if how:
                count[how.partition(":")[0]] += 1
        if (run.folder / "final.safetensors").is_file() and run.outcome()["code"] == 0:
            break
    found = differing(run, reference)
    # A run that had finished when it was started again says so.
    return [text for text in found if "already finished" not in text]


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill runs at random and compare their ends.")
    parser.add_argument("--minutes", type=float, default=30, help="start no further run after so many")
    parser.add_argument("--processes", type=int, default=2, help="training processes of each run")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of faults")
    words = parser.parse_args()
    chance, count, bad = random.Random(words.seed), Counter[str](), 0
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        folder = Path(name)
        shards = write_tiny_shards(folder / "data")
        reference = Run(folder / "reference", shards, {})
        assert reference.go(words.processes).returncode == 0, "the undisturbed run failed"
        deadline, runs = time.monotonic() + 60 * words.minutes, 0
        while time.monotonic() < deadline:
            runs += 1
            run = Run(folder / f"run-{runs}", shards, {})
            wrong = soak(run, reference, words.processes, chance, count)
            bad += bool(wrong)
            print(f"run {runs}: {'; '.join(wrong[:5]) if wrong else 'the same'}", flush=True)
    for what, times in sorted(count.items(), key=lambda item: (-item[1], item[0])):
        print(f"{times:5} {what}")
    print(f"{runs} runs of {words.processes} processes, {bad} of them with differences")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
