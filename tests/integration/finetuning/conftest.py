"""Finetuning runs as a user starts them, each shared by the tests of a file."""

import subprocess

import pytest

from tests.conversations import finetuning_flags, write_conversations
from tests.support import environment


@pytest.fixture(scope="module")
def conversations(tmp_path_factory):
    folder = tmp_path_factory.mktemp("conversations")
    write_conversations(folder)
    return folder


@pytest.fixture(scope="module")
def finetune(torchrun, conversations, tmp_path_factory):
    """Run the command to its end; gives the run's folder and what it printed."""

    def call(processes, stage=2, *more, folder=None):
        folder = folder or tmp_path_factory.mktemp("finetuned") / "run"
        command = torchrun(
            processes, "launch/finetune_mlm.py", *finetuning_flags(conversations, folder, stage, *more)
        )
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr[-3000:]
        return folder, done.stdout + done.stderr

    return call


@pytest.fixture(scope="module")
def alone(finetune):
    return finetune(1)


@pytest.fixture(scope="module")
def second(finetune):
    return finetune(2, 2)


@pytest.fixture(scope="module")
def third(finetune):
    return finetune(2, 3)
