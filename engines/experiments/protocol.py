"""Running a protocol: its cells one by one, by one process or shared among tasks, and the merging.

    DIR/settings.json     what the results depend on; a rerun must have the same
    DIR/cells/NAME/       result.json of a finished cell (or failure.json), and what it came from
    DIR/protocol.json     the merged result, see `engines.experiments.protocol_result`
    DIR/protocol.md       the same as tables

A cell is finished when its result.json is there, and is never done again. Whoever computes
a cell holds its lock.
"""

import json
import os
import shutil
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataio.core.atomic import write_text
from dataio.core.errors import UserError
from dataio.core.locks import locked
from dataio.core.tasks import ArrayTask, check_settings
from engines.config.protocol import FREE, Command
from engines.experiments.protocol_cells import SHARDS, Cell, Protocol, open_protocol
from engines.experiments.protocol_result import RESULT, TABLE, format_result, merge_cells
from engines.runtime.command import Stopped

SETTINGS, CELLS, LOCKS = "settings.json", "cells", ".locks"
_NAMED = 10  # cells in a message


@dataclass(frozen=True)
class _Folder:
    """The folder of a protocol's results."""

    path: Path

    def cell(self, cell: Cell) -> Path:
        return self.path / CELLS / cell.name

    def result(self, cell: Cell) -> dict[str, Any] | None:
        return _read(self.cell(cell) / "result.json")

    def failure(self, cell: Cell) -> str | None:
        found = _read(self.cell(cell) / "failure.json")
        return None if found is None else str(found["message"])

    def claim(self, settings: dict[str, Any]) -> None:
        """Make the folder this protocol's, or check that it is.

        Raises:
            UserError: it holds something else, was begun with other settings, or cannot be
                written.
        """
        with _disk_errors(self.path):
            self._refuse_others()
            (self.path / LOCKS).mkdir(parents=True, exist_ok=True)
            with locked(self.path / LOCKS / "settings.lock", wait=f"{self.path}: waiting for another task"):
                stored = _read(self.path / SETTINGS)
                if stored is None:
                    write_text(self.path / SETTINGS, json.dumps(settings, indent=1) + "\n")
                else:
                    check_settings(self.path, stored, settings)

    def _refuse_others(self) -> None:
        if (self.path / SETTINGS).exists() or not self.path.exists():
            return
        ours = (LOCKS, f".{SETTINGS}")
        if any(not entry.name.startswith(ours) for entry in self.path.iterdir()):
            raise UserError(f"--output {self.path}: holds something else; choose an empty or new folder")


def run_protocol(command: Command) -> str:
    """Do the cells of a command, and merge them unless it is one task of several.

    Returns:
        what to print.

    Raises:
        UserError: what `open_protocol` raises; a folder that does not do; cells that failed (after
            the others were done and merged), are missing, or are being done elsewhere.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "protocol.py runs in one process; share the cells with --task i/n instead of torchrun"
        )
    if command.task is not None and command.finish:
        raise UserError("--task and --finish: give one; --finish comes when all tasks are done")
    share = ArrayTask.parse(command.task) if command.task is not None else None
    protocol, folder = open_protocol(command.config), _Folder(command.output)
    settings = {key: value for key, value in protocol.settings.items() if key not in FREE}
    if command.finish and not (folder.path / SETTINGS).exists():
        raise UserError(f"--finish: {folder.path} has no results; run the tasks first (--task)")
    folder.claim(settings)
    if share is not None:
        return _run_share(protocol, folder, share)
    if not command.finish:
        busy = _run_cells(protocol, folder, protocol.cells)
        if busy:
            raise UserError(
                f"--output {folder.path}: {_names(busy)} being done by another process; run the same again later"
            )
    # Of two last tasks both may merge.
    with locked(folder.path / LOCKS / "finish.lock", wait=f"{folder.path}: waiting for another task"):
        return _finish(protocol, folder)


def _run_share(protocol: Protocol, folder: _Folder, share: ArrayTask) -> str:
    mine = share.among(protocol.cells)
    busy = _run_cells(protocol, folder, mine)
    failed = [cell for cell in mine if folder.result(cell) is None and cell not in busy]
    if failed:
        raise UserError(f"task {share}: {_failures(folder, failed, len(mine))}")
    missing = sum(folder.result(cell) is None for cell in protocol.cells)
    then = f"{missing} of {len(protocol.cells)} are missing" if missing else "all are there: now --finish"
    others = f" ({len(busy)} by another process)" if busy else ""
    return f"task {share}: {len(mine)} cells{others}; {then}"


def _run_cells(protocol: Protocol, folder: _Folder, cells: Sequence[Cell]) -> list[Cell]:
    """Do the cells that are not done, whatever becomes of each.

    Returns:
        those that another process is doing.
    """
    busy = []
    for number, cell in enumerate(cells, start=1):
        where = f"[{number}/{len(cells)}] {cell.name}"
        try:
            # A lock outside of the cell's folder: that one is removed and made anew.
            with locked(folder.path / LOCKS / f"{cell.name}.lock"):
                if folder.result(cell) is not None:
                    print(f"{where}: done already", flush=True)
                else:
                    print(where, flush=True)
                    _run_cell(protocol, folder, cell)
                if not protocol.config.keep_shards:
                    shutil.rmtree(folder.cell(cell) / SHARDS, ignore_errors=True)
        except BlockingIOError:
            print(f"{where}: another process is doing it", flush=True)
            busy.append(cell)
    return busy


def _run_cell(protocol: Protocol, folder: _Folder, cell: Cell) -> None:
    own = folder.cell(cell)
    try:
        own.mkdir(parents=True, exist_ok=True)
        (own / "failure.json").unlink(missing_ok=True)
        result = protocol.run(cell, own)
    except Stopped:
        raise
    # Anything else: one cell must not take a night's others with it. What is no user's mistake
    # is shown whole.
    except Exception as error:
        if isinstance(error, UserError):
            message = str(error)
        else:
            traceback.print_exc()
            message = f"{type(error).__name__}: {' '.join(str(error).split())}"
        print(f"  failed: {message}", flush=True)
        _write(own / "failure.json", {"message": message})
        return
    _write(own / "result.json", {"name": cell.name, **cell.about, **result})


def _finish(protocol: Protocol, folder: _Folder) -> str:
    results = {cell.name: result for cell in protocol.cells if (result := folder.result(cell)) is not None}
    undone = [cell for cell in protocol.cells if cell.name not in results]
    missing = [cell for cell in undone if folder.failure(cell) is None]
    if missing:
        raise UserError(
            f"--finish: {len(missing)} of {len(protocol.cells)} cells of {folder.path} are missing: "
            f"{_names(missing)}; run their tasks again, or the same without --finish"
        )
    failures = {cell.name: folder.failure(cell) or "" for cell in undone}
    merged = merge_cells(protocol, list(results.values()), failures)
    _write(folder.path / RESULT, merged)
    text = format_result(merged)
    with _disk_errors(folder.path):
        write_text(folder.path / TABLE, text + "\n")
    if undone:
        print(text)
        raise UserError(_failures(folder, undone, len(protocol.cells)))
    return f"{text}\n\nresults: {folder.path / RESULT}, {folder.path / TABLE}"


def _failures(folder: _Folder, failed: Sequence[Cell], of: int) -> str:
    first = f"{failed[0].name} first ({folder.failure(failed[0])})"
    return f"{len(failed)} of {of} cells failed, {first}: {_names(failed)}; mend that and run the same again"


def _names(cells: Sequence[Cell]) -> str:
    more = f" and {len(cells) - _NAMED} more" if len(cells) > _NAMED else ""
    return ", ".join(cell.name for cell in cells[:_NAMED]) + more


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); remove it and run the same again") from None


def _write(path: Path, value: dict[str, Any]) -> None:
    with _disk_errors(path.parent):
        write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except BlockingIOError:
        raise
    except OSError as error:
        raise UserError(
            f"--output {folder}: cannot be written ({error.strerror or error}); mend that or choose another"
        ) from None
