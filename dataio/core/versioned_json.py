"""Reading JSON files that name their format and version."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from dataio.core.errors import UserError, one_line


class ReadableText(Protocol):
    """A file that is no local path and can be read like one."""

    def read_text(self, encoding: str) -> str: ...


def read_versioned_json(
    path: str | Path | ReadableText,
    format: str,
    versions: Sequence[int],
    hint: str,
    *,
    what: str,
    key: str = "format",
) -> dict[str, Any]:
    """Read a JSON object and check its format and version.

    Args:
        format, versions, key: see `parse_versioned_json`.
        hint: what the user can do about any other file.
        what: the kind of file, with its article: "a calibration".

    Raises:
        FileNotFoundError: there is no such file; the caller knows how to make one.
        UserError: the file cannot be read, is not a JSON object, or has another format or
            version.
    """
    try:
        return parse_versioned_json(path, format, versions, key=key)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not {what} ({one_line(error)[:200]}); {hint}") from None


def parse_versioned_json(
    path: str | Path | ReadableText, format: str, versions: Sequence[int], *, key: str = "format"
) -> dict[str, Any]:
    """The same for callers that have a message of their own.

    Args:
        format: the expected value of `key`. versions: those that this release reads; empty
            where the file's version does not matter.

    Raises:
        OSError, ValueError, RecursionError: the file cannot be read, is not a JSON object, or
            has another format or version.
    """
    file = Path(path) if isinstance(path, str) else path
    values = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError(f"it holds a {type(values).__name__}, expected an object")
    if values.get(key) != format:
        raise ValueError(f"{key} is {values.get(key)!r}, expected {format!r}")
    if versions and values.get("version") not in versions:
        readable = " or ".join(map(str, versions))
        raise ValueError(f"version {values.get('version')}, this telltale reads {readable}")
    return values
