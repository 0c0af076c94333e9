"""Reads the `.wandb` file that Weights & Biases writes: LevelDB's log format, of protocol buffers.

The format: https://github.com/google/leveldb/blob/main/doc/log_format.md, after a header of 7 bytes.
"""

import json
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

_HEADER, _BLOCK, _RECORD = 7, 32768, 7
_WHOLE, _LAST = 1, 4


@dataclass
class WandbFile:
    """What a run's file holds: the run's own record, metrics that were defined, rows, summary, alerts, artifacts."""

    run: Any = None
    metrics: dict[str, str] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    alerts: list[tuple[str, str, str]] = field(default_factory=list)
    artifacts: list[Any] = field(default_factory=list)
    exit_code: int | None = None

    @property
    def config(self) -> dict[str, Any]:
        return {item.key: json.loads(item.value_json) for item in self.run.config.update}

    def values(self, name: str) -> dict[int, Any]:
        """A metric by step."""
        return {row["_step"]: row[name] for row in self.history if name in row}

    def table(self, name: str) -> tuple[list[str], list[list[Any]], dict[str, Path]]:
        """A table's columns, its rows, and the files of its pictures by the path that a cell names."""
        [contents] = [item.manifest.contents for item in self.artifacts if item.name.endswith(f"-{name}")]
        files = {entry.path: Path(entry.local_path) for entry in contents}
        content = json.loads(files[f"{name}.table.json"].read_text())
        return content["columns"], content["data"], files


def read_wandb_file(path: Path) -> WandbFile:
    """Read one file; `path` may be the folder that it is the only one in."""
    if path.is_dir():
        [path] = path.rglob("run-*.wandb")
    found = WandbFile()
    for record in _records(path.read_bytes()):
        kind = record.WhichOneof("record_type")
        content = getattr(record, kind)
        if kind == "run":
            found.run = content
        elif kind == "metric":
            found.metrics[content.name or content.glob_name] = content.step_metric
        elif kind == "history":
            found.history.append(_items(content.item))
        elif kind == "summary":
            found.summary |= _items(content.update)
        elif kind == "alert":
            found.alerts.append((content.title, content.text, content.level))
        elif kind == "artifact":
            found.artifacts.append(content)
        elif kind == "exit":
            found.exit_code = content.exit_code
    return found


def _items(items: Any) -> dict[str, Any]:
    return {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


def _records(data: bytes) -> Any:
    assert data[:4] == b":W&B"
    place, whole = _HEADER, b""
    while place + _RECORD <= len(data):
        left = _BLOCK - place % _BLOCK
        if left < _RECORD:  # filled with zeros
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        whole += data[place + _RECORD : place + _RECORD + length]
        place += _RECORD + length
        if kind in (_WHOLE, _LAST):
            record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
            record.ParseFromString(whole)
            whole = b""
            yield record
