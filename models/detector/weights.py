"""Loading initial weights: torchvision's and timm's files and names, and telltale's own checkpoints."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torchvision
from safetensors import safe_open

from models.detector.backbones.timm_nets import TIMM
from models.detector.dual_head import DualHead, WeightsError

_HEADS = ("generator_head.", "object_head.")


@dataclass
class WeightReport:
    """Which tensors of a weights file were loaded, by name.

    Attributes:
        matched, dropped, fresh: names. notes: for the user. origin: the plain values of a
            telltale checkpoint (its labels, codec and config), else empty.
    """

    matched: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    origin: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        text = f"{len(self.matched)} tensors loaded"
        if self.dropped:
            text += f", dropped from the file: {_first(self.dropped)}"
        if self.fresh:
            text += f", left at their random start: {_first(self.fresh)}"
        return "; ".join([text, *self.notes])

    def to_text(self) -> str:
        """Every name, one a line, for a file."""
        parts = (
            ("loaded", self.matched),
            ("dropped from the file", self.dropped),
            ("left at their start", self.fresh),
        )
        lines = [
            f"{len(names)} {title}\n" + "".join(f"  {name}\n" for name in names) for title, names in parts
        ]
        return "\n".join([*lines, *(f"{note}\n" for note in self.notes)])


def _first(names: list[str], shown: int = 8) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def read_state(source: str, backbone: str) -> Mapping[str, Any]:
    """Read a file (.safetensors, or a torch file without code in it) or a torchvision name.

    Raises:
        WeightsError: not found, not readable, or not a mapping of tensors.
    """
    path = Path(source)
    if path.exists():
        try:
            if path.suffix == ".safetensors":
                return _read_safetensors(path)
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise WeightsError(f"{path}: cannot be read as weights ({reason}); give a state dict") from None
    if backbone.startswith(TIMM):
        return _download_timm(source, backbone.removeprefix(TIMM))
    weights = _torchvision_weights(source, backbone)
    try:
        return weights.get_state_dict(progress=False, check_hash=True)
    except OSError as error:
        raise WeightsError(
            f"model.weights: {weights.url} could not be downloaded ({error}); fetch it once where there is a network: "
            f"{fetch_command(source, backbone)}, or give the file"
        ) from None


def find_weights(source: str, backbone: str) -> Path | None:
    """Where `read_state` would find weights on this machine; None if it would download them.

    Raises:
        WeightsError: neither a file nor a name that can be downloaded.
    """
    path = Path(source)
    if path.exists():
        return path
    if backbone.startswith(TIMM):
        if source != "pretrained":
            raise _no_timm_file(source, backbone.removeprefix(TIMM))
        return None  # where depends on the model's own hub
    cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(_torchvision_weights(source, backbone).url).name
    return cached if cached.is_file() else None


def fetch_command(source: str, backbone: str) -> str:
    """The command that downloads weights of a name to where `read_state` looks for them.

    Raises:
        WeightsError: torchvision has no such weights.
    """
    if backbone.startswith(TIMM):
        return (
            f"python -c \"import timm; timm.create_model('{backbone.removeprefix(TIMM)}', pretrained=True)\""
        )
    weights = _torchvision_weights(source, backbone)
    return f"python -c \"import torchvision; torchvision.models.get_weight('{weights}').get_state_dict()\""


def _torchvision_weights(source: str, backbone: str) -> Any:
    try:
        names = {weight.name: weight for weight in torchvision.models.get_model_weights(backbone)}
    except ValueError:  # our own backbones are not in torchvision
        names = {}
    if source not in names:
        raise WeightsError(
            f"model.weights: {source!r} is neither a file nor torchvision weights of {backbone} "
            f"({', '.join(names) or 'which has none'})"
        )
    return names[source]


def _read_safetensors(path: Path) -> Mapping[str, Any]:
    """Tensors; with telltale's metadata (final.safetensors, an export) as its checkpoints have it."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    if "labels" not in metadata:
        return tensors
    return {
        **{key: json.loads(value) for key, value in metadata.items() if key != "format"},
        "model": tensors,
    }


def _download_timm(source: str, name: str) -> Mapping[str, Any]:
    if source != "pretrained":
        raise _no_timm_file(source, name)
    import timm

    try:
        return timm.create_model(name, pretrained=True).state_dict()
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise WeightsError(
            f"model.weights: timm:{name} could not be downloaded ({reason}); download it elsewhere and give the file"
        ) from None


def _no_timm_file(source: str, name: str) -> WeightsError:
    return WeightsError(
        f"model.weights: {source!r} is not a file; for timm:{name} give one, or `pretrained` to download"
    )


def _unwrapped(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """The tensors of a file that other programs wrote: out of their wrapping, without DDP's prefix."""
    for key in ("model_ema", "state_dict_ema", "state_dict", "model"):
        if isinstance(content.get(key), Mapping):
            content = content[key]
            break
    tensors = {name: tensor for name, tensor in content.items() if isinstance(tensor, torch.Tensor)}
    return {
        name.removeprefix("_orig_mod.").removeprefix("module."): tensor for name, tensor in tensors.items()
    }


def load_weights(model: DualHead, source: str, backbone: str) -> WeightReport:
    """Load what fits into `model`; heads of other label spaces are dropped and reported.

    Args:
        model: is changed in place.
        source: see `read_state`; torchvision's names go to the backbone, telltale's
            checkpoints (with "model" and label spaces inside) to backbone and heads.
        backbone: the model's torchvision name.

    Raises:
        WeightsError: unreadable, or the backbone's tensors are missing or of other shapes.
    """
    tensors = read_state(source, backbone)
    report = WeightReport()
    drop: set[str] = set()
    if "labels" in tensors and isinstance(tensors.get("model"), Mapping):
        labels = tensors["labels"]
        report.origin = {key: tensors[key] for key in ("labels", "codec", "config") if key in tensors}
        for head, ours in (("generator", model.generators), ("object", model.objects)):
            theirs = tuple(labels.get(f"{head}s", ()))
            if theirs != ours:
                drop.add(f"{head}_head.")
                report.notes.append(
                    f"the {head} head is new: the file's label space is {_brief(theirs)}, ours {_brief(ours)}"
                )
        tensors = tensors.get("ema", tensors["model"])
    else:
        tensors = _unwrapped(tensors)
        if not any(name.startswith(("backbone.", *_HEADS)) for name in tensors):
            tensors = {f"backbone.{name}": tensor for name, tensor in tensors.items()}
    if not tensors:
        raise WeightsError(f"{source}: has no tensors in it; give a state dict")
    target = model.state_dict()
    fitting = {}
    for name, tensor in tensors.items():
        if name not in target or any(name.startswith(prefix) for prefix in drop):
            report.dropped.append(name)
        elif target[name].shape != tensor.shape:
            if not name.startswith(_HEADS):
                raise WeightsError(
                    f"{source}: {name} has shape {list(tensor.shape)}, the model's is {list(target[name].shape)}; "
                    "choose the model.backbone and model.stem the file was made with"
                )
            report.dropped.append(name)
        else:
            fitting[name] = tensor
    report.fresh = [name for name in target if name not in fitting]
    missing = [name for name in report.fresh if not name.startswith(_HEADS) and "num_batches" not in name]
    if missing:
        raise WeightsError(
            f"{source}: {len(missing)} tensors of the backbone are missing, {missing[0]} first; "
            "choose the model.backbone the file was made with"
        )
    model.load_state_dict(fitting, strict=False)
    report.matched = list(fitting)
    return report


def _brief(names: tuple[str, ...]) -> str:
    shown = ", ".join(names[:10])
    return f"[{shown}{', ...' if len(names) > 10 else ''}] ({len(names)})"
