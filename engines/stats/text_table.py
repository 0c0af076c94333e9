"""One way to print a table on a terminal or into Markdown."""

from collections.abc import Sequence
from typing import Any

import tabulate

# Headers are padded by two more columns by default; wide tables then exceed a terminal.
tabulate.MIN_PADDING = 0


def text_table(
    rows: Sequence[Sequence[Any]], headers: Sequence[str] = (), *, markdown: bool = False, align: str = ""
) -> str:
    """Rows as aligned columns.

    Args:
        rows: cells, formatted by the caller where the format matters; None shows as nothing.
        headers: one for each column; empty for none.
        markdown: a GitHub table instead of plain columns.
        align: one letter for each column: l, r or c; by default text left and numbers right.
    """
    names = {"l": "left", "r": "right", "c": "center"}
    text = tabulate.tabulate(
        rows,
        headers=headers,
        tablefmt="github" if markdown else "simple" if headers else "plain",
        colalign=[names[letter] for letter in align] if align and rows else None,
        disable_numparse=True,
        missingval="",
    )
    return "\n".join(line.rstrip() for line in text.split("\n"))
