"""Run a protocol: compute its cells, in one process or as tasks of a job array, and merge them.

    DIR/settings.json     what the results depend on; a rerun must have the same
    DIR/cells/NAME/       result.json of a finished cell (or failure.json), and its intermediate files
    DIR/protocol.json     the merged result, see `engines.experiments.protocol_result`
    DIR/protocol.md       the same as tables

A cell with a result.json is finished and never computed again. The process that computes a
cell holds its lock.
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
from dataio.core.errors import UserError, one_line, reason_of
from dataio.core.locks import locked
from dataio.core.log import log
from dataio.core.tasks import ArrayTask, check_settings, parse_task
from engines.config.protocol import FREE, Command
from engines.experiments.protocol_cells import SHARDS, Cell, Protocol, open_protocol
from engines.experiments.protocol_result import RESULT, RESULT_TABLE, format_result, merge_cells
from engines.experiments.protocol_wandb import send_protocol
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
        failure = _read(self.cell(cell) / "failure.json")
        return None if failure is None else str(failure["message"])

    def claim(self, settings: dict[str, Any]) -> None:
        """Create the folder for this protocol, or check that it belongs to it.

        Raises:
            UserError: it holds other files, was begun with other settings, or cannot be written.
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
        own_files = (LOCKS, f".{SETTINGS}")
        if any(not entry.name.startswith(own_files) for entry in self.path.iterdir()):
            raise UserError(
                "holds other files; choose an empty or new folder", field="output", value=self.path
            )


def run_protocol(command: Command) -> str:
    """Compute the cells of a command, and merge them unless it is one task of several.

    Returns:
        a summary to print.

    Raises:
        UserError: see `open_protocol`; a folder of another protocol; cells that failed (after the
            others were computed and merged), are missing, or are being computed elsewhere.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("a protocol runs in one process; share the cells with --task i/n instead of torchrun")
    share = parse_task(command.task, finish=command.finish)
    protocol, folder = open_protocol(command.config), _Folder(command.output)
    settings = {key: value for key, value in protocol.settings.items() if key not in FREE}
    if command.finish and not (folder.path / SETTINGS).exists():
        raise UserError(f"{folder.path} has no results; run the tasks first (--task)", field="finish")
    folder.claim(settings)
    if share is not None:
        return _run_share(protocol, folder, share)
    if not command.finish:
        busy = _run_cells(protocol, folder, protocol.cells)
        if busy:
            raise UserError(
                f"another process is computing {_names(busy)}; run the same again later",
                field="output",
                value=folder.path,
            )
    # Two tasks may both be the last one and merge.
    with locked(folder.path / LOCKS / "finish.lock", wait=f"{folder.path}: waiting for another task"):
        return _finish(protocol, folder, command.wandb)


def _run_share(protocol: Protocol, folder: _Folder, share: ArrayTask) -> str:
    mine = share.among(protocol.cells)
    busy = _run_cells(protocol, folder, mine)
    failed = [cell for cell in mine if folder.result(cell) is None and cell not in busy]
    if failed:
        raise UserError(f"task {share}: {_failures(folder, failed, len(mine))}")
    missing = sum(folder.result(cell) is None for cell in protocol.cells)
    then = f"{missing} of {len(protocol.cells)} are missing" if missing else "all are done: now --finish"
    others = f" ({len(busy)} by another process)" if busy else ""
    return f"task {share}: {len(mine)} cells{others}; {then}"


def _run_cells(protocol: Protocol, folder: _Folder, cells: Sequence[Cell]) -> list[Cell]:
    """Compute the unfinished cells; a failure does not stop the others.

    Returns:
        cells that another process is computing.
    """
    busy = []
    for number, cell in enumerate(cells, start=1):
        where = f"[{number}/{len(cells)}] {cell.name}"
        try:
            # The lock is outside the cell's folder, which may be removed.
            with locked(folder.path / LOCKS / f"{cell.name}.lock"):
                if folder.result(cell) is not None:
                    log.info(f"{where}: already done")
                else:
                    log.info(where)
                    _run_cell(protocol, folder, cell)
                if not protocol.config.keep_shards:
                    shutil.rmtree(folder.cell(cell) / SHARDS, ignore_errors=True)
        except BlockingIOError:
            log.info(f"{where}: another process is computing it")
            busy.append(cell)
    return busy


def _run_cell(protocol: Protocol, folder: _Folder, cell: Cell) -> None:
    cell_folder = folder.cell(cell)
    try:
        cell_folder.mkdir(parents=True, exist_ok=True)
        (cell_folder / "failure.json").unlink(missing_ok=True)
        result = protocol.run(cell, cell_folder)
    except Stopped:
        raise
    # One failed cell must not stop the others of a long run. Programming errors are shown with
    # their traceback.
    except Exception as error:
        if isinstance(error, UserError):
            message = str(error)
        else:
            traceback.print_exc()
            message = f"{type(error).__name__}: {one_line(error)}"
        log.info(f"  failed: {message}")
        _write(cell_folder / "failure.json", {"message": message})
        return
    _write(cell_folder / "result.json", {"name": cell.name, **cell.about, **result})


def _finish(protocol: Protocol, folder: _Folder, wandb: str) -> str:
    results = {cell.name: result for cell in protocol.cells if (result := folder.result(cell)) is not None}
    undone = [cell for cell in protocol.cells if cell.name not in results]
    missing = [cell for cell in undone if folder.failure(cell) is None]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(protocol.cells)} cells of {folder.path} are missing: "
            f"{_names(missing)}; run their tasks again, or the same without --finish",
            field="finish",
        )
    failures = {cell.name: folder.failure(cell) or "" for cell in undone}
    merged = merge_cells(protocol, list(results.values()), failures)
    _write(folder.path / RESULT, merged)
    text = format_result(merged)
    with _disk_errors(folder.path):
        write_text(folder.path / RESULT_TABLE, text + "\n")
    send_protocol(folder.path, wandb, merged, protocol.config.checkpoint)
    if undone:
        log.info(text)
        raise UserError(_failures(folder, undone, len(protocol.cells)))
    return f"{text}\n\nresults: {folder.path / RESULT}, {folder.path / RESULT_TABLE}"


def _failures(folder: _Folder, failed: Sequence[Cell], of: int) -> str:
    first = f"{failed[0].name} first ({folder.failure(failed[0])})"
    return f"{len(failed)} of {of} cells failed, {first}: {_names(failed)}; fix that and run the same again"


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
        text = f"cannot be written ({reason_of(error)}); fix that or choose another"
        raise UserError(text, field="output", value=folder) from None
