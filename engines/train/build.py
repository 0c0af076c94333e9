"""Building the model of a training run: initial weights, class weights, DDP and compilation."""

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dataio.core.errors import as_user_error
from dataio.loading.balanced_order import class_counts
from dataio.shards.shard_set import ShardSet
from engines.checkpoint.contract import codec_differences, preprocessing_differences
from engines.config.detector import Config
from engines.config.values import to_dict
from engines.runtime.distributed import World
from engines.runtime.precision import set_tf32
from engines.train.batchnorm import RunningStatistics
from models.detector.dual_head import DualHead, probe_size, whiten_stem
from models.detector.weights import WeightReport, load_weights


def make_deterministic(config: Config) -> None:
    """Set threads and algorithms by the configuration, so that bits repeat."""
    # torchrun sets OMP_NUM_THREADS only for several processes, and the number of
    # threads changes the last bits: so it comes from the configuration, always.
    torch.set_num_threads(config.train.threads)
    set_tf32(config.train.tf32)
    if config.train.deterministic:
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    else:
        torch.backends.cudnn.benchmark = True


def build_model(
    config: Config, shards: ShardSet, device: torch.device, first_images: torch.Tensor | None = None
) -> tuple[DualHead, WeightReport | None]:
    """The network at its start, on the device, and which tensors of its weights file were loaded.

    Args:
        shards: of the training, whose labels both heads have; where the weights' own training had another
            codec policy or preprocessing, the report notes it.
        first_images: float [N, 3, size, size], for `model.whiten`.

    Raises:
        UserError: weights that cannot be read or do not fit.
    """
    report = None
    torch.manual_seed(config.run.seed)
    size = config.data.size
    with as_user_error():
        model = DualHead(config.model, shards.labels.generators, shards.labels.objects, image_size=size)
        # Batch norm that never leaves the evaluation mode takes any micro-batch.
        probe_size(model, size, 2 if config.train.frozen_epochs == -1 else config.train.micro_batch)
        if config.model.weights:
            report = load_weights(model, config.model.weights, config.model.backbone)
            report.notes += _other_training(report, config, shards.manifest["codec"])
        if config.model.whiten and first_images is not None:
            whiten_stem(model, first_images)
    layout = torch.channels_last if config.train.channels_last else torch.contiguous_format
    return model.to(device, memory_format=layout), report  # type: ignore[call-overload]


def _other_training(report: WeightReport, config: Config, codec: Mapping[str, Any]) -> list[str]:
    """Notes on how the images differed that initial weights of another run were trained on."""
    theirs = report.origin.get("config")
    data = theirs.get("data") if isinstance(theirs, dict) else None
    differences = codec_differences(codec, report.origin.get("codec"), ("here", "in its training"))
    if isinstance(data, dict):
        differences += preprocessing_differences(to_dict(config)["data"], data)
    return (
        [f"note that the file was trained on other images: {'; '.join(differences)}"] if differences else []
    )


def class_weights(config: Config, shards: ShardSet, device: torch.device) -> torch.Tensor | None:
    """Weights of the generator head's classes, float32 [G]; their mean over the images is 1."""
    rule = config.loss.class_weights
    if rule == "none":
        return None
    counts = class_counts(shards).astype(np.float64)
    weights = np.where(counts > 0, 1 / np.maximum(counts, 1) ** (1.0 if rule == "inverse" else 0.5), 0.0)
    weights *= counts.sum() / (weights * counts).sum()
    return torch.tensor(weights, dtype=torch.float32, device=device)


def wrap(
    model: DualHead, config: Config, world: World, statistics: RunningStatistics, image_size: int
) -> nn.Module:
    """Wrap the model in DDP if there are several ranks, and compile it if `train.compile` is set."""
    wrapped: nn.Module = model
    if world.distributed and world.size > 1:
        with warnings.catch_warnings():
            # Newer versions rename broadcast_buffers; the old name works on all we support.
            warnings.simplefilter("ignore", FutureWarning)
            wrapped = DistributedDataParallel(
                model,
                device_ids=[world.device.index] if world.device.type == "cuda" else None,
                broadcast_buffers=False,  # the running statistics are averaged, once per step
                gradient_as_bucket_view=True,
                # Both heads are in every loss, and what is frozen is wrapped anew: one graph for all
                # steps. Not of a compiled model: it was not tried.
                static_graph=not config.train.compile,
            )
        shape = (config.train.micro_batch, 3, image_size, image_size)
        image = torch.zeros(shape, device=world.device).contiguous(memory_format=torch.channels_last)
        _settle_buckets(wrapped, model, statistics, image)
    return torch.compile(wrapped) if config.train.compile else wrapped  # type: ignore[return-value]


def _settle_buckets(
    wrapped: nn.Module, model: DualHead, statistics: RunningStatistics, image: torch.Tensor
) -> None:
    """Let DDP rebuild its buckets before the first step instead of after it.

    DDP regroups its buckets once it has seen one backward pass. A resumed run would
    do so one step later than the undisturbed one, reduce in another order, and differ
    in the last bits on 4 ranks. Two passes of zero loss settle it beforehand.
    """
    statistics.begin_step()
    for _ in range(2):
        generator_logits, object_logits = wrapped(image)
        (generator_logits.sum() * 0 + object_logits.sum() * 0).backward()
    model.zero_grad(set_to_none=True)
    statistics.restore()
