"""How many examples the fuzz tests draw.

    python -m pytest tests/fuzz                               # a few, as make test does
    python -m pytest tests/fuzz --hypothesis-profile=long     # 100 times as many
    TELLTALE_FUZZ_EXAMPLES=100000 python -m pytest tests/fuzz --hypothesis-profile=long

A failing example is printed in its smallest form; it becomes a test of its own beside the
parser's other tests, or an `@example` here.
"""

import os
import shutil

import pytest
from hypothesis import HealthCheck, settings

_ALL = list(HealthCheck)
_EXAMPLES = int(os.environ.get("TELLTALE_FUZZ_EXAMPLES", "3000"))
settings.register_profile("short", max_examples=30, deadline=None, suppress_health_check=_ALL)
settings.register_profile("long", max_examples=_EXAMPLES, deadline=None, suppress_health_check=_ALL)


@pytest.fixture(scope="module")
def shards(tiny_shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz") / "shards"
    shutil.copytree(tiny_shards, folder)
    return folder


@pytest.fixture
def whole(shards, tiny_shards):
    """The folder, put back in order after the test."""
    yield shards
    shutil.rmtree(shards)
    shutil.copytree(tiny_shards, shards)
