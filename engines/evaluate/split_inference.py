"""Run a checkpoint over shards: every image once, on any number of processes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from dataio.core.log import log
from dataio.loading.loader import Loader
from dataio.loading.training_order import evaluation_specs
from dataio.shards.shard_set import ShardSet
from engines.checkpoint.contract import check_shards
from engines.checkpoint.files import weights_sha256
from engines.checkpoint.load_model import load_model
from engines.config.detector import Config
from engines.evaluate.calibration import load_calibration
from engines.evaluate.predictions import PredictionArrays
from engines.runtime.distributed import World, init_distributed, on_all_ranks, shutdown_distributed
from engines.runtime.inference import HostCopy, fetch_late, inference_batch
from engines.runtime.precision import PRECISIONS, resolve_precision, set_tf32
from models.detector.dual_head import DualHead


def predict_split(
    checkpoint: str,
    data: str,
    split: str,
    *,
    batch: int | None = None,
    mirror: bool = False,
    verify: bool = False,
    threads: int | None = None,
    calibrated: bool = True,
    other_codec: bool = False,
) -> PredictionArrays | None:
    """Predict every image of a split once; also under torchrun.

    Args:
        checkpoint: best.pt or a file of RUN/checkpoints. data: shard folder.
        batch: images per forward pass; None for 4 times the training's micro-batch, and
            on a GPU for at least `inference_batch`.
        mirror: average the probabilities of each image and its mirror image.
        verify: check the shards' SHA-256 first.
        threads: CPU threads of PyTorch; None for this process's share of the cores.
        calibrated: record the checkpoint's calibration, if there is one; the probabilities
            stay raw. Ignored with `mirror`: a calibration holds for single views only.
        other_codec: accept shards of another codec policy than the checkpoint's, with a warning.

    Returns:
        the predictions on rank 0, None on the others.

    Raises:
        UserError: on every rank, see `load_model` and `ShardSet`; label spaces or codec policies
            that differ.
    """
    world = init_distributed()
    try:
        model, config, info = on_all_ranks(world, lambda: load_model(checkpoint))
        info["checkpoint"], info["split"] = Path(checkpoint).name, split
        on_all_ranks(world, lambda: _describe(checkpoint, model, info, calibrated and not mirror))
        shards = on_all_ranks(world, lambda: ShardSet(data, split, verify=verify))
        described = on_all_ranks(
            world, lambda: check_shards(checkpoint, info, shards, other_codec=other_codec)
        )
        if world.is_main and described["codec_differences"]:
            log.warning(
                f"{data}: coded differently than the images that {checkpoint} was trained on: "
                f"{'; '.join(described['codec_differences'])}. These figures do not hold for telltale predict"
            )
        from dataio.core.cores import cores_per_process

        torch.set_num_threads(threads or cores_per_process())
        batch = batch or inference_batch(config.data.size, 4 * config.train.micro_batch, world.device)
        arrays = predict_share(model, config, shards, world, batch, mirror)
        parts: list[Any] = [None] * world.size
        if world.distributed:
            # Ranks hold contiguous slices in rank order.
            dist.gather_object(arrays, parts if world.is_main else None)
        else:
            parts = [arrays]
        if not world.is_main:
            return None
        ids, probabilities, top5, identities = (
            np.concatenate(columns) for columns in zip(*parts, strict=True)
        )
        rows = shards.rows[ids]
        return PredictionArrays(
            sample_id=ids,
            key=[f"{int(key):09d}" for key in rows["key"]],
            generator=rows["generator"].astype(np.int64),
            object=rows["object"].astype(np.int64),
            generator_probability=probabilities,
            object_top5=top5,
            generators=shards.labels.generators,
            objects=shards.labels.objects,
            identity=[row.tobytes().hex() for row in identities],
            data={**described, "identity": shards.identified_by},
            checkpoint={
                **{key: info[key] for key in _DESCRIBED if key in info},
                **({"mirror": True} if mirror else {}),
            },
        )
    finally:
        shutdown_distributed(world)


_DESCRIBED = ("checkpoint", "step", "layout", "split", "weights_sha256", "calibration")


def _describe(checkpoint: str, model: DualHead, info: dict[str, Any], calibrated: bool) -> None:
    """Add the digest of the weights to `info`, and their calibration where there is one."""
    weights = model.state_dict()
    info["weights_sha256"] = weights_sha256(weights)
    calibration = load_calibration(checkpoint, weights) if calibrated else None
    if calibration is not None:
        info["calibration"] = calibration.summary()


def forward(model: DualHead, image: torch.Tensor, precision: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Both heads' logits, [N, G] and [N, O], in evaluation's precision.

    Args:
        image: float32 [N, 3, S, S] on the model's device. precision: fp32, bf16 or fp16.
    """
    with autocast(image.device, precision):
        return model(image)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context in which `precision` (fp32, bf16 or fp16) holds on the device."""
    return torch.autocast(device.type, PRECISIONS.get(precision, torch.bfloat16), enabled=precision != "fp32")


@torch.inference_mode()
def predict_share(
    model: DualHead, config: Config, shards: ShardSet, world: World, batch: int, mirror: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Predict this rank's slice; on a GPU the host queues batches ahead of the device.

    Args:
        model: in evaluation mode. batch: images per forward pass. mirror: see `predict_split`.

    Returns:
        ids int64 [n], P(generator) float64 [n, G], object top-5 int64 [n, <= 5], identities uint8 [n, 16].
    """
    layout = torch.channels_last if config.train.channels_last else torch.contiguous_format
    model = model.to(world.device, memory_format=layout)  # type: ignore[call-overload]
    precision = resolve_precision(config.train.precision, world.device)
    set_tf32(config.train.tf32)
    work = evaluation_specs(shards, config.data, batch=batch, rank=world.rank, world=world.size)
    best = min(5, max(1, len(shards.labels.objects)))
    ids, probabilities, top5 = [np.zeros(0, np.int64)], [], []
    probabilities.append(np.zeros((0, len(shards.labels.generators))))
    top5.append(np.zeros((0, best), np.int64))
    identities = [shards.identities(np.zeros(0, np.int64))]

    def answers() -> Iterator[HostCopy]:
        half = precision != "fp32"
        for loaded in Loader(
            shards, config.data, work, batch=batch, device=world.device, train=False, half=half
        ):
            views = [forward(model, loaded.image, precision)]
            if mirror:
                views.append(forward(model, loaded.image.flip(3), precision))
            generator, objects = (
                torch.stack([view[head].double().softmax(1) for view in views]).mean(0) for head in (0, 1)
            )
            copy = HostCopy([generator, objects.topk(best).indices])
            ids.append(loaded.sample_id.numpy())
            identities.append(shards.identities(ids[-1]))  # where images must be read for it, they are cached
            yield copy

    # One autocast around all batches: within it the weights are rounded once.
    with autocast(world.device, precision):
        for generator, likeliest in fetch_late(answers()):
            # Copies: pinned memory is used again.
            probabilities.append(generator.numpy().copy())
            top5.append(likeliest.numpy().copy())
    return tuple(np.concatenate(parts) for parts in (ids, probabilities, top5, identities))  # type: ignore[return-value]
