"""How many examples the fuzz tests draw.

    python -m pytest tests/fuzz                               # a few, as make test does
    python -m pytest tests/fuzz --hypothesis-profile=long     # 100 times as many
    TELLTALE_FUZZ_EXAMPLES=100000 python -m pytest tests/fuzz --hypothesis-profile=long

A failing example is printed in its smallest form; it becomes a test of its own beside the
parser's other tests, or an `@example` here.
"""

import os

from hypothesis import HealthCheck, settings

_ALL = list(HealthCheck)
_EXAMPLES = int(os.environ.get("TELLTALE_FUZZ_EXAMPLES", "3000"))
settings.register_profile("short", max_examples=30, deadline=None, suppress_health_check=_ALL)
settings.register_profile("long", max_examples=_EXAMPLES, deadline=None, suppress_health_check=_ALL)
