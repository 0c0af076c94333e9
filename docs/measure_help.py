"""Time the --help of every command: `python docs/measure_help.py [REPEATS]` prints a Markdown table.

Each is the fastest of several fresh processes, so that what else the machine does counts little.
"""

import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from telltale.cli import COMMANDS  # noqa: E402


def seconds_of_help(command: list[str], repeats: int) -> float:
    """Wall seconds of the fastest of `repeats` runs of `telltale COMMAND --help`."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "telltale", *command, "--help"], cwd=ROOT, check=True, capture_output=True
        )
        times.append(time.perf_counter() - begin)
    return min(times)


def main() -> None:
    """Print the table."""
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    print("| Command | --help, s |\n|---|---|")
    for command in ([], *([name] for group in COMMANDS.values() for name in group)):
        print(
            f"| `{' '.join(['telltale', *command])}` | {seconds_of_help(command, repeats):.2f} |", flush=True
        )


if __name__ == "__main__":
    main()
