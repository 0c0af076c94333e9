"""What the fuzz tests feed parsers: files and trees of values that are almost right, and the one property."""

import contextlib
import copy
import json
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st

from dataio.core.errors import UserError

LONG = settings.get_current_profile_name() == "long"
if not LONG:
    settings.load_profile("short")


@contextlib.contextmanager
def parsed_or_told():
    """The one property of this file."""
    try:
        yield
    except UserError as error:
        assert "\n" not in str(error) and str(error).strip()


def mutated(data: bytes) -> st.SearchStrategy[bytes]:
    """`data` cut, with bytes changed, a part doubled or removed, or replaced by noise."""
    places = st.integers(0, max(0, len(data) - 1))

    def change(edits):
        found = bytearray(data)
        for kind, place, value in edits:
            place = min(place, len(found))
            if kind == "byte" and place < len(found):
                found[place] = value[0] if value else 0
            elif kind == "insert":
                found[place:place] = value
            elif kind == "remove":
                del found[place : place + 1 + len(value)]
            elif kind == "cut":
                del found[place:]
            elif kind == "again":
                found += found[place : place + 64]
        return bytes(found)

    kinds = st.sampled_from(["byte", "byte", "byte", "insert", "remove", "cut", "again"])
    edits = st.lists(st.tuples(kinds, places, st.binary(max_size=12)), min_size=1, max_size=6)
    return edits.map(change) | st.binary(max_size=600)


leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=True)
    | st.text(max_size=8)
    | st.sampled_from(["../x", "/etc/passwd", "train/000000.tar", "nature", "\0", "\ud800"])
)
values = st.recursive(
    leaves,
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=5), v, max_size=3),
    max_leaves=6,
)


def paths_of(tree: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [prefix] * bool(prefix) + [p for key, value in items for p in paths_of(value, (*prefix, key))]


def grafted(tree: Any) -> st.SearchStrategy[Any]:
    """`tree` with one or two parts replaced by any value, or removed."""

    def graft(edits):
        found = copy.deepcopy(tree)
        for path, value, remove in edits:
            place = found
            try:
                for key in path[:-1]:
                    place = place[key]
                if remove:
                    del place[path[-1]]
                else:
                    place[path[-1]] = value
            except (KeyError, IndexError, TypeError):
                continue  # an earlier edit took it away
        return found

    edit = st.tuples(st.sampled_from(paths_of(tree)), values, st.booleans())
    return st.lists(edit, min_size=1, max_size=2).map(graft) | values


def dump(tree: Any) -> str:
    return json.dumps(tree, default=str)
