"""The batch scripts as text: bash and shellcheck find nothing to say."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest


def scripts(repo_root: Path) -> list[Path]:
    found = sorted((repo_root / "slurm").glob("*.sh"))
    assert len(found) > 6
    return found


def test_bash_reads_every_script(repo_root: Path) -> None:
    for script in scripts(repo_root):
        done = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), script


def test_shellcheck_finds_nothing(repo_root: Path) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck not found: apt-get install -y shellcheck")
    done = subprocess.run(
        ["shellcheck", "--external-sources", *scripts(repo_root)],
        cwd=repo_root,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


SHOWN = """JobId=17 JobName=telltale-train
   UserId=someone(1000) GroupId=someone(1000) MCS_label=N/A
   JobState=RUNNING Reason=None Dependency=(null)
   Comment=Command=no
   Command={}
   WorkDir=/somewhere
   StdOut=/somewhere/telltale-train-17.out
"""


@pytest.mark.parametrize("folder", ["slurm", "a b/my  slurm", "x.sh/slurm"])
@pytest.mark.parametrize(
    "arguments",
    [
        "",
        " --config configs/x.yaml",
        " --data.hook /other/tool.sh",
        " --then other/stage.sh --x 'a b' /end.sh ",
    ],
)
def test_a_script_in_the_spool_finds_its_own_folder(
    repo_root: Path, tmp_path: Path, folder: str, arguments: str
) -> None:
    here = tmp_path / folder
    here.mkdir(parents=True)
    (here / "common.sh").touch()
    for script in scripts(repo_root):
        text = script.read_text()
        if script.name == "common.sh":
            continue
        # From the spool's comment to the line that reads common.sh, as it stands in the script.
        part = text[text.index("here=$(dirname") : text.index("# shellcheck source")]
        shown = SHOWN.format(f"{here}/{script.name}{arguments}")
        spool = tmp_path / "spool" / "slurm_script"
        spool.parent.mkdir(exist_ok=True)
        spool.write_text(f'set -euo pipefail\nscontrol() {{ cat "$SHOWN"; }}\n{part}\nprintf %s "$here"')
        (tmp_path / "shown").write_text(shown)
        environment = {"PATH": os.environ["PATH"], "SHOWN": str(tmp_path / "shown"), "SLURM_JOB_ID": "17"}
        done = subprocess.run(["bash", spool], capture_output=True, text=True, env=environment)
        assert (done.stdout, done.stderr) == (str(here), "")
        (tmp_path / "shown").write_text(SHOWN.format("(null)"))
        done = subprocess.run(["bash", spool], capture_output=True, text=True, env=environment)
        assert done.returncode == 2 and "Slurm names (null), without a common.sh beside it" in done.stderr
