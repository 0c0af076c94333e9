"""What several test files share: a tiny configuration, clean environments, processes."""

import csv
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

TINY = {
    "data.size": 24,
    "data.crop": "random",
    "data.pad": 2,
    "data.eval_crop": 0.75,
    "data.window_shards": 2,
    "model.backbone": "resnet18",
    "model.stem": "pooled",
    "optim.lr": 0.005,
    "train.epochs": 1.5,
    "train.global_batch": 16,
    "train.micro_batch": 4,
    "log.wandb": "off",
    "log.every": 1,
}


def flags(**changes: object) -> list[str]:
    """TINY with changes (dots written as double underscores), as command-line flags."""
    settings = {**TINY, **{key.replace("__", "."): value for key, value in changes.items()}}
    return [word for key, value in settings.items() for word in (f"--{key}", str(value))]


def environment() -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("TORCHELASTIC", "OMP_NUM"))}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "WANDB_API_KEY"):
        clean.pop(name, None)
    return clean


def descendants(pid: int) -> list[int]:
    """Process ids of all children, grandchildren and so on."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(folder.name))
    found, todo = [], [pid]
    while todo:
        own = children.get(todo.pop(), [])
        found += own
        todo += own
    return found


def command_line(pid: int) -> list[str]:
    """A process's program and arguments; [] if it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
    except OSError:
        return []


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s in vain for {what}"
        time.sleep(0.02)


def differences(a: Any, b: Any, name: str = "") -> list[str]:
    """Names of the leaves that are not bit for bit the same."""
    import torch

    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) else [name]
    if isinstance(a, dict):
        missing = [f"{name}.{key}" for key in a.keys() ^ b.keys()]
        return missing + [
            d for key in a.keys() & b.keys() for d in differences(a[key], b[key], f"{name}.{key}")
        ]
    if isinstance(a, list):
        return [
            d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{name}[{i}]")
        ]
    return [] if a == b else [name]


def write_tiny_shards(folder: Path) -> Path:
    """Make and shard about 130 images of 32 px in a folder; two in three objects unknown, unevenly."""
    from dataio.images.codec import preset_policy
    from dataio.layouts.genimage import GenImageLayout
    from dataio.layouts.manifest import ManifestLayout
    from dataio.layouts.synthetic import write_synthetic
    from dataio.sharding.job import write_shards

    folder.mkdir(exist_ok=True)
    write_synthetic(folder / "source", images=160, size=32, seed=3)
    with open(folder / "list.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "generator", "object", "split"])
        for number, record in enumerate(GenImageLayout(folder / "source", val_fraction=0.1).records()):
            known = number % 3 == 0 and record.generator == "nature"
            writer.writerow([record.path, record.generator, record.object if known else "", record.split])
    layout = ManifestLayout(folder / "list.csv", root=folder / "source")
    write_shards(layout, folder / "shards", preset_policy("default", 32), samples_per_shard=20, quiet=True)
    return folder / "shards"


def write_detector(
    path: Path,
    *,
    seed: int = 1,
    generators: Sequence[str] = ("nature", "adm"),
    objects: Sequence[str] = ("cat", "dog", "frog"),
    codec: dict[str, Any] | None = None,
    size: int = 32,
    backbone: str = "cifarnet_narrow",
) -> Path:
    """Write a checkpoint of random weights; returns its path."""
    import torch

    from engines.checkpoint import files as checkpoints
    from engines.config.detector import from_dict
    from models.detector.dual_head import DualHead

    config = {"model": {"backbone": backbone}, "data": {"size": size, "eval_crop": 0.875}}
    torch.manual_seed(seed)
    model = DualHead(from_dict(config).model, generators, objects)
    # A fresh network hardly tells one image from another: give it statistics and a wide head.
    coarse, fine = torch.randn(16, 3, 4, 4), torch.randn(16, 3, size, size)
    images = torch.nn.functional.interpolate(coarse, size=size, mode="bilinear") + 0.3 * fine
    head = model.generator_head
    assert isinstance(head, torch.nn.Linear)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # one batch is all there is
    with torch.no_grad():
        model.train()(images)
        logits = model.eval()(images)[0]
        head.weight.mul_(2 / logits.std(0, keepdim=True).T)
        head.bias.sub_(model(images)[0].mean(0))
    state = {
        "format": checkpoints.FORMAT,
        "version": checkpoints.VERSION,
        "step": 5,
        "model": checkpoints.cpu_state(model),
        "labels": {"generators": list(generators), "objects": list(objects)},
        "codec": codec or {"preset": "default", "resize": "shortest", "size": 32},
        "layout": "synthetic",
        "config": config,
    }
    checkpoints.save(path, state)
    return path
