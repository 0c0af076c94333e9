"""Checkpoints that are either complete or absent.

A file is written under a temporary name, synced and renamed, and its folder is synced; so
`step_00000123.pt` is always a complete file, whatever killed the run. Later damage by the disk is
detected by the CRC-32 of every record in the container. A SHA-256 beside it would detect no more:
a digest only defends against tampering, and a tamperer can replace it too.
"""

import hashlib
import io
import json
import os
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from dataio.core.atomic import write_with
from dataio.core.errors import UserError, one_line
from engines.runtime import fault_injection as faults

FORMAT = "telltale-checkpoint"
VERSION = 1
_NAME = re.compile(r"step_(\d{8})\.pt")


def save(path: Path, state: dict[str, Any]) -> None:
    """Write one checkpoint file (tensors and plain values only), atomically.

    Raises:
        OSError: the disk is full or fails; what was at `path` stays.
    """
    # Through memory: torch's own writer does not report a full disk as an OSError.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data, step = buffer.getbuffer(), state.get("step")

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            file.write(data[: len(data) // 2])
            faults.inject("checkpoint.write", step)
            file.write(data[len(data) // 2 :])

    write_with(path, write, reached=lambda stage: faults.inject(f"checkpoint.{stage}", step))


def cpu_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """A module's state as separate CPU tensors (running statistics are views of one)."""
    return {
        name: tensor.detach().to("cpu", copy=True).contiguous()
        for name, tensor in module.state_dict().items()
    }


def locate(path: str | Path) -> Path:
    """The file or export that a path means: best.pt for a run's folder, else the path itself."""
    path = Path(path)
    best = path / "best.pt"
    return best if best.is_file() and not (path / "config.json").exists() else path


def load(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint or best.pt; tensors on the CPU, no code is ever run.

    Raises:
        UserError: missing, damaged, or not a telltale checkpoint.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: is a folder, expected a checkpoint file such as {path / 'best.pt'}")
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint file; expected a file such as RUN/best.pt, or its RUN")
    if path.suffix == ".safetensors":
        return _load_safetensors(path)
    damage = find_damage(path)
    if damage:
        raise UserError(f"{path}: {damage}, or not a checkpoint; expected a file such as RUN/best.pt")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = one_line(error)[:200]
        raise UserError(f"{path}: not a telltale checkpoint ({reason})") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(
            f"{path}: not a telltale checkpoint (no format mark); give a file written by telltale train"
        )
    if state.get("version") != VERSION:
        raise UserError(
            f"{path}: version {state.get('version')!r:.40}, this telltale reads {VERSION}; update it"
        )
    return state


def _load_safetensors(path: Path) -> dict[str, Any]:
    """A run's final.safetensors, whose metadata holds what a checkpoint has beside its tensors."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        state = {key: json.loads(value) for key, value in metadata.items() if key != "format"}
        return {**state, "model": tensors, "labels": state["labels"], "config": state["config"]}
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = one_line(error)[:200]
        raise UserError(
            f"{path}: not a telltale checkpoint ({reason}); give a file written by telltale train"
        ) from None


def find_damage(path: Path) -> str:
    """What is wrong with the container, or "" if every record's CRC-32 holds."""
    try:
        with zipfile.ZipFile(path) as container:
            bad = container.testzip()
    except Exception as error:  # damage makes zipfile raise all kinds of them
        return f"damaged ({one_line(error)})"
    return f"damaged (record {bad} fails its checksum)" if bad else ""


class CheckpointFolder:
    """RUN/checkpoints: the newest few checkpoints of a run, by step."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        if not self.folder.is_dir():
            return []
        return sorted(int(m[1]) for m in map(_NAME.fullmatch, os.listdir(self.folder)) if m)

    def path(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}.pt"

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Commit a checkpoint, then delete what is older than the last `keep`.

        Raises:
            OSError: it could not be written; those before it stay.
        """
        faults.inject("checkpoint.begin", step)
        self.folder.mkdir(parents=True, exist_ok=True)
        save(self.path(step), state)
        self.retain()
        return self.path(step)

    def retain(self) -> None:
        """Delete what is older than the last `keep`."""
        steps = self.steps()
        for old in steps[: -self.keep]:
            faults.inject("checkpoint.delete", steps[-1])
            self.path(old).unlink()

    def prepare(self) -> None:
        """Create the folder, check that it is writable, and remove the temporary files of killed saves.

        Raises:
            UserError: it cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in [*self.folder.glob(".*.tmp"), *self.folder.parent.glob(".*.pt.tmp")]:
                leftover.unlink()
            probe = self.folder / ".probe.tmp"
            probe.write_bytes(bytes(4096))
            probe.unlink()
        except OSError as error:
            raise UserError(
                f"{self.folder}: checkpoints cannot be written there ({error.strerror}); make it writable, free "
                "space, or choose another run.dir"
            ) from None

    def load_newest(self, warn: Callable[[str], None]) -> dict[str, Any] | None:
        """The newest undamaged checkpoint; None where there is none at all.

        Raises:
            UserError: there are checkpoints and every one is damaged.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                return load(self.path(step))
            except UserError as error:
                warn(f"{error}; trying the one before")
        if steps:
            raise UserError(
                f"{self.folder}: all {len(steps)} checkpoints are damaged; "
                "start again with resume none and another run.dir"
            )
        return None


def weights_sha256(weights: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of named tensors: the same for a checkpoint and its export."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
