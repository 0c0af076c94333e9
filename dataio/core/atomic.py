"""Files that are complete or not there."""

import os
from collections.abc import Callable
from pathlib import Path


def write_with(
    path: Path,
    write: Callable[[Path], None],
    label: str = "",
    reached: Callable[[str], None] = lambda stage: None,
) -> None:
    """Let `write` fill a temporary file beside `path`, then make it `path` in one step.

    Args:
        label: goes into the temporary name, for processes that may write the same file.
        reached: is told each stage: "written", "fsynced", "renamed".
    """
    temporary = path.with_name(f".{path.name}.{label}.tmp" if label else f".{path.name}.tmp")
    try:
        write(temporary)
        reached("written")
        os.chmod(temporary, 0o644)  # some writers (safetensors) make private files
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        reached("fsynced")
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    reached("renamed")
    sync_folder(path.parent)


def write_text(path: Path, text: str, label: str = "") -> None:
    """Write UTF-8 text, atomically."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape")

    write_with(path, write, label)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
