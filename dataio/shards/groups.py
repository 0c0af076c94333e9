"""Which images belong together: a CSV of path and group, joined to shards by their sources."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from dataio.core.csv_table import CsvTable
from dataio.core.errors import UserError
from dataio.layouts.labels import tidy
from dataio.shards.shard_set import ShardSet


def read_groups(file: str | Path) -> dict[str, str]:
    """{path: group} of a CSV with these two columns; other columns are ignored, "" means no group.

    Raises:
        UserError: what `CsvTable` raises, or a path in two groups.
    """
    groups: dict[str, str] = {}
    for line, row in CsvTable(file, required=("path", "group"), field="groups").rows():
        # As the manifest layout reads both, so that one file serves for both.
        path = "/".join(part for part in row["path"].split("/") if part not in ("", "."))
        group = tidy(row["group"])
        if groups.setdefault(path, group) != group:
            raise UserError(
                f"line {line}: {path} is in {groups[path]!r} and in {group!r}; name it once",
                field="groups",
                value=file,
            )
    return groups


def groups_of(shards: ShardSet, ids: Sequence[int], groups: Mapping[str, str], file: str) -> list[str]:
    """The groups of samples of a split, by their sources' paths.

    Raises:
        UserError: a sample that the file does not name.
    """
    sample_groups = []
    for number in ids:
        source = str(shards.about(int(number))["source"])
        if source not in groups:
            raise UserError(
                f"does not name {source} ({shards.describe(int(number))}); expected every image of the "
                f"{shards.split} split",
                field="groups",
                value=file,
            )
        sample_groups.append(groups[source])
    return sample_groups
