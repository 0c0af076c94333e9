"""Where messages go: nowhere by default, and to the right stream in a command."""

import subprocess
import sys

from dataio.core.log import log, progress

LIBRARY = """
from dataio.core.log import log
log.info("working"); log.warning("careful")
"""


def test_a_program_that_asks_for_nothing_gets_warnings_only(repo_root):
    done = subprocess.run(
        [sys.executable, "-c", LIBRARY], cwd=repo_root, capture_output=True, text=True, check=True
    )
    assert done.stdout == "" and done.stderr == "careful\n"


def test_a_command_shows_information_and_keeps_standard_output_clean_of_the_rest(capsys):
    log.info("100 %s images")
    progress.info("50/100")
    log.warning("one is damaged")
    log.error("stopped")
    out, err = capsys.readouterr()
    assert out == "100 %s images\n"
    assert err == "50/100\nwarning: one is damaged\nerror: stopped\n"
