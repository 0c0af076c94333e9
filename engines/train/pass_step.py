"""One forward and backward pass over several micro-batches: its inputs, and its part of the gradient.

Everything that changes from step to step comes in as tensors on the device, so that the same
function runs eagerly and inside a captured CUDA graph.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from dataio.core.counter_rng import PURPOSE_FORWARD, hash64
from dataio.loading.loader import Batch
from dataio.loading.trace import record_range
from engines.config.detector import Config
from engines.runtime.precision import PRECISIONS
from engines.train.batchnorm import RunningStatistics
from engines.train.meters import MetricSums
from engines.train.mixup import apply_mix, draw_mix, image_before, per_image
from models.detector.dual_head import DualHead, LabelMixture, dual_head_loss
from models.detector.keyed_dropout import DropoutKeys
from models.detector.norms.ghost_norm import set_ghosts

# Rows of `PassInputs.numbers`; BOX takes four. All but KEY are float64's bits.
_KEY, _KNOWN, _BLEND, _OWN_SHARE, _BOX, _ROWS = 0, 1, 2, 3, 4, 8


Gather = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class HeldBatch:
    """A batch of a split that is held on the device, before it is cut out.

    Attributes:
        columns: int64 [K, N] in pinned memory, see `dataio.loading.in_memory.InMemoryLoader.gather`.
    """

    columns: torch.Tensor

    @property
    def sample_id(self) -> torch.Tensor:
        """The images, int64 [N]."""
        return self.columns[0]


@dataclass
class PassInputs:
    """What a pass computes from, on the device: images and labels, or columns to cut them out by.

    Attributes:
        image: float [N, 3, H, W], channels-last. generator, object_label: int64 [N]. columns: see `HeldBatch`.
        numbers: int64 [8, G], a column for each micro-batch: dropout's key, known objects in the
            global batch, how it is mixed; one tensor, so that one copy brings all.
    """

    numbers: torch.Tensor
    image: torch.Tensor | None = None
    generator: torch.Tensor | None = None
    object_label: torch.Tensor | None = None
    columns: torch.Tensor | None = None

    def copy_(self, other: "PassInputs") -> None:
        """Take another's values, on the device."""
        for name in ("numbers", "image", "generator", "object_label", "columns"):
            mine = getattr(self, name)
            if mine is not None:
                mine.copy_(getattr(other, name), non_blocking=True)


class PassStep:
    """Computes a pass's gradient, metrics and batch statistics; nothing in it waits for the device.

    Args:
        config: the run's. model: the network, without DDP. keys: of its dropout.
        statistics: of its batch norms. precision: fp32, bf16 or fp16. scaler: of fp16's loss.
        class_weights: float32 [G], see `engines.train.build.class_weights`.
        gather: makes images, generators and objects out of a `HeldBatch`'s columns.
    """

    def __init__(
        self,
        config: Config,
        model: DualHead,
        keys: DropoutKeys,
        statistics: RunningStatistics,
        *,
        precision: str,
        scaler: torch.amp.GradScaler,
        class_weights: torch.Tensor | None,
        device: torch.device,
        gather: Gather | None = None,
    ) -> None:
        self._gather = gather
        self.config, self._model, self._keys, self._statistics = config, model, keys, statistics
        self.precision, self._scaler, self.class_weights = precision, scaler, class_weights
        self._device = device
        self._mixes = config.mix.mixup > 0 or config.mix.cutmix > 0
        self._before: dict[tuple[int, int], torch.Tensor] = {}

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The context of a forward pass."""
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, PRECISIONS[self.precision])

    def blank_inputs(self, micro_batches: int, *, columns: int = 0) -> PassInputs:
        """Inputs of a pass, all zero but for one known object.

        Args:
            columns: rows of a `HeldBatch`'s columns, where the pass is to cut its images out itself.
        """
        images, size, device = (
            micro_batches * self.config.train.micro_batch,
            self.config.data.size,
            self._device,
        )
        numbers = torch.ones(_ROWS, micro_batches, dtype=torch.float64, device=device).view(torch.int64)
        if columns:
            return PassInputs(numbers, columns=torch.zeros(columns, images, dtype=torch.int64, device=device))
        half = device.type == "cuda" and self.precision != "fp32"  # as the loader gives them
        image = torch.zeros(
            images, 3, size, size, dtype=torch.float16 if half else torch.float32, device=device
        )
        labels = torch.zeros(2, images, dtype=torch.int64, device=device)
        return PassInputs(numbers, image.contiguous(memory_format=torch.channels_last), labels[0], labels[1])

    def inputs(
        self, batch: Batch | HeldBatch, *, step: int, micro_batches: range, known_objects: int
    ) -> PassInputs:
        """A batch and what is drawn for its micro-batches.

        Args:
            step: steps done. micro_batches: their numbers in the global batch.
            known_objects: labels of objects in the global batch.
        """
        config = self.config
        places = np.arange(micro_batches.start, micro_batches.stop)
        numbers = np.zeros((_ROWS, len(places)))
        numbers[_KNOWN] = known_objects
        if self._mixes:
            size = config.data.size
            draws = draw_mix(
                config.mix,
                height=size,
                width=size,
                seed=config.run.seed,
                step=step,
                micro_batches=micro_batches,
            )
            numbers[_BLEND], numbers[_OWN_SHARE], numbers[_BOX:] = draws.blend, draws.own_share, draws.box.T
        table = torch.from_numpy(numbers.view(np.int64))
        keys = hash64(config.run.seed, step, PURPOSE_FORWARD, places.astype(np.uint64))
        table[_KEY] = torch.from_numpy(keys.view(np.int64))
        if self._device.type == "cuda":
            table = table.pin_memory()
        table = table.to(self._device, non_blocking=True)
        if isinstance(batch, HeldBatch):
            return PassInputs(table, columns=batch.columns.to(self._device, non_blocking=True))
        return PassInputs(table, batch.image, batch.generator, batch.object_label)

    def expect_one_micro_batch(self) -> None:
        """Let the model take a single micro-batch, outside of `compute`."""
        set_ghosts(self._model, 1)
        self._keys.keys = torch.zeros(1, dtype=torch.int64, device=self._device)

    def seed_generator(self, step: int, micro_batches: range) -> None:
        """Seed torch's generator, for layers that draw from it in spite of the keys."""
        number = micro_batches.start
        torch.manual_seed(int(hash64(self.config.run.seed, step, PURPOSE_FORWARD, number)) >> 1)

    def compute(
        self,
        inputs: PassInputs,
        sums: MetricSums,
        forward: nn.Module,
        *,
        loss_scale: int = 1,
        corrupt: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        """Add a pass's gradient to the parameters', its losses and errors to `sums`, its statistics too.

        Args:
            forward: the model, or what wraps it. loss_scale: the number of ranks where DDP divides by it.
            corrupt: changes the generator's logits; see `engines.runtime.fault_injection`.
        """
        config, numbers = self.config, inputs.numbers
        micro_batches = numbers.shape[1]
        real = numbers.view(torch.float64)
        set_ghosts(self._model, micro_batches)
        self._keys.keys = numbers[_KEY]
        image, generator, object_label = self._images(inputs)
        mixture = None
        if self._mixes:
            with record_range("augment"):
                before = self._partners(len(image), micro_batches)
                own_share = per_image(real[_OWN_SHARE].float(), len(image) // micro_batches)
                mixture = LabelMixture(before, own_share)
                image = apply_mix(image, before, real[_BLEND].float(), real[_BOX:].T.long())
        with record_range("forward"), self.autocast():
            generator_logits, object_logits = forward(image)
        if corrupt is not None:
            generator_logits = corrupt(generator_logits)
        generator_loss, object_loss = dual_head_loss(
            generator_logits,
            object_logits,
            generator,
            object_label,
            label_smoothing=config.loss.label_smoothing,
            generator_weights=self.class_weights,
            mixture=mixture,
        )
        loss = (
            config.loss.generator * generator_loss / config.train.global_batch
            + config.loss.object * object_loss / real[_KNOWN, 0].float()
        )
        with record_range("backward"):
            self._scaler.scale(loss if loss_scale == 1 else loss * loss_scale).backward()
        with torch.no_grad():
            # Of the unmixed labels: errors stay comparable with validation's.
            sums.add(generator_logits, object_logits, generator, object_label)
            self._statistics.end_pass(micro_batches)

    def _images(self, inputs: PassInputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if inputs.columns is not None:
            assert self._gather is not None
            return self._gather(inputs.columns)
        assert inputs.image is not None and inputs.generator is not None and inputs.object_label is not None
        return inputs.image, inputs.generator, inputs.object_label

    def _partners(self, images: int, micro_batches: int) -> torch.Tensor:
        key = (images, micro_batches)
        if key not in self._before:
            self._before[key] = image_before(images, micro_batches, self._device)
        return self._before[key]
