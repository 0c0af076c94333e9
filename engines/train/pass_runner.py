"""The passes of a step: how many micro-batches each holds, and how they run, eagerly or captured."""

import contextlib
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dataio.core.errors import UserError
from dataio.loading.in_memory import InMemoryLoader
from dataio.loading.loader import Batch
from dataio.loading.training_order import passes_of
from engines.config.detector import Config
from engines.runtime import fault_injection as faults
from engines.runtime.distributed import World
from engines.train.batchnorm import RunningStatistics
from engines.train.build import wrap
from engines.train.cuda_graph import PassGraphs, forbidden
from engines.train.meters import MetricSums
from engines.train.pass_size import choose_micro_batches
from engines.train.pass_step import HeldBatch, PassStep
from models.detector.dual_head import DualHead
from models.detector.keyed_dropout import use_keyed_dropout
from models.detector.norms.ghost_norm import use_ghost_norms


class PassRunner:
    """Runs a rank's passes and adds up over ranks what they leave.

    Args:
        config: the run's. world: the processes. share: this rank's micro-batches, by number.
        model: on its device; its norms and dropout are replaced by those of ghost batches.
        precision, scaler, class_weights: see `PassStep`. gatherer: of a split that is held on the device.

    Attributes:
        passes: the micro-batches of each pass of a step; none before `prepare`.
        micro_batches: the most that a pass holds. sums: metrics of the step in hand.
        statistics: of the batch norms. eager_reason: why no pass is captured, "" if they are.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        share: range,
        model: DualHead,
        *,
        precision: str,
        scaler: torch.amp.GradScaler,
        class_weights: torch.Tensor | None,
        gatherer: InMemoryLoader | None = None,
    ) -> None:
        self._config, self._world, self._share, self._model = config, world, share, model
        unreplaced = use_ghost_norms(model)
        keys, self._seeded_layers = use_keyed_dropout(model)
        keys.keys = keys.keys.to(world.device)
        self._obstacles = [*unreplaced, *self._seeded_layers]
        self.statistics = RunningStatistics(model)
        self.sums = MetricSums.empty(world.device)
        self.step_of_pass = PassStep(
            config,
            model,
            keys,
            self.statistics,
            precision=precision,
            scaler=scaler,
            class_weights=class_weights,
            device=world.device,
            gather=gatherer.gather if gatherer is not None else None,
        )
        self._columns = gatherer.columns if gatherer is not None else 0
        self.passes: list[range] = []
        self.micro_batches = self._stored = 0
        self._graphs: PassGraphs | None = None
        self._prepared = False
        self.eager_reason = ""
        self._forward: nn.Module = model

    def forget(self) -> None:
        """Prepare anew: what has gradients has changed, which DDP must know, and a graph is of it."""
        self._graphs, self._prepared = None, False

    def prepare(self) -> None:
        """Choose how many micro-batches a pass holds, and capture the passes; all ranks call it together.

        Where passes are not captured, the model is wrapped in DDP, or compiled. It is in the mode it is
        trained in. State is as before.

        Raises:
            UserError: `train.graph` is on and the passes cannot be captured.
        """
        if self._prepared:
            return
        if not self.passes:
            self.micro_batches = choose_micro_batches(
                self._config.train,
                self._world,
                obstacles=self._obstacles,
                stored=self._stored,
                peak_bytes=self._peak_bytes,
            )
            self.passes = passes_of(self._share, self.micro_batches)
        self._capture()
        if self.eager_reason and self._config.train.graph == "on":
            raise UserError(f"train.graph is on, but {self.eager_reason}; set it to auto or off")
        if self.eager_reason:
            size = self._config.data.size
            self.step_of_pass.expect_one_micro_batch()
            self._forward = wrap(self._model, self._config, self._world, self.statistics, size)
        self._prepared = True

    def _peak_bytes(self, micro_batches: int) -> int:
        """Bytes that a pass takes at its peak on this GPU; the state is as before."""
        device = self._world.device
        self.statistics.begin_step()
        before = torch.cuda.memory_allocated(device)
        inputs = self.step_of_pass.blank_inputs(micro_batches)
        try:
            for _ in range(2):  # in the first pass cuDNN tries algorithms that take more
                torch.cuda.reset_peak_memory_stats(device)
                self.step_of_pass.compute(inputs, self.sums, self._model)
        finally:
            self._model.zero_grad(set_to_none=True)
            self.statistics.restore()
        return torch.cuda.max_memory_allocated(device) - before

    def _capture(self) -> None:
        """Capture the passes where the options allow it, on all ranks or on none."""
        self.eager_reason = forbidden(self._config, self._world, self._seeded_layers)
        if self.eager_reason:
            return
        if self._world.distributed and self._world.size > 1:
            # As DDP does: a start that was computed may differ between machines.
            for tensor in self._model.state_dict().values():
                dist.broadcast(tensor, 0)
        blank = partial(self.step_of_pass.blank_inputs, columns=self._columns)
        graphs = PassGraphs(self.step_of_pass, self._model, self.statistics, self.sums, blank, self._world)
        self.eager_reason = graphs.capture(self.passes)
        if self.eager_reason:
            self._model.zero_grad(set_to_none=True)
        else:
            self._graphs = graphs

    @property
    def cuts_out(self) -> bool:
        """Whether `run` takes each `HeldBatch` instead of each `Batch`: captured passes of a held split."""
        return self._graphs is not None and self._columns > 0

    def begin_step(self) -> None:
        """Start the sums of a step."""
        self.sums.sums.zero_()
        self.statistics.begin_step()

    def run(self, batch: Batch | HeldBatch, micro_batches: range, *, step: int, known_objects: int) -> None:
        """Add the gradient, metrics and batch statistics of one of `passes`.

        Args:
            batch: its images. step: steps done. known_objects: labels of objects in the global batch.
        """
        inputs = self.step_of_pass.inputs(
            batch, step=step, micro_batches=micro_batches, known_objects=known_objects
        )
        if self._graphs is not None:
            self._graphs.run(inputs)
            return
        self.step_of_pass.seed_generator(step, micro_batches)
        corrupt = (lambda logits: faults.corrupt_logits(logits, step)) if faults.any_set() else None
        with self._gradient_sync(micro_batches == self.passes[-1]):
            # DDP divides by the number of ranks; the loss is already a global mean.
            self.step_of_pass.compute(
                inputs, self.sums, self._forward, loss_scale=self._world.size, corrupt=corrupt
            )

    def _gradient_sync(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Let DDP reduce the gradient with the last pass only, once per step."""
        if last or not isinstance(self._forward, DistributedDataParallel):
            return contextlib.nullcontext()
        return self._forward.no_sync()

    def reduce(self) -> None:
        """Add up over ranks: batch statistics and metrics in one collective, captured passes' gradients before.

        The running statistics are the new ones then.
        """
        if self._world.distributed and self._world.size > 1:
            if self._graphs is not None:
                dist.all_reduce(self._graphs.gradients.flat)
            statistics, metrics = self.statistics.sums, self.sums.sums
            packed = torch.cat([statistics, metrics])
            dist.all_reduce(packed)
            statistics.copy_(packed[: len(statistics)])
            metrics.copy_(packed[len(statistics) :])
        train = self._config.train
        self.statistics.end_step(train.global_batch // train.micro_batch)

    def clear_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Ready for the next step; a graph adds to the gradients' memory, so that stays."""
        if self._graphs is not None:
            self._graphs.gradients.flat.zero_()
        else:
            optimizer.zero_grad(set_to_none=True)

    def describe(self) -> str:
        """The size of the passes and how they are launched, for the run's first lines; "" for plain ones."""
        train = self._config.train
        parts = []
        if self.micro_batches > 1:
            parts.append(
                f"passes of {self.micro_batches * train.micro_batch} images, {self.micro_batches} micro-batches each"
            )
        if self._world.device.type == "cuda":
            parts.append(
                f"no CUDA graph: {self.eager_reason}" if self.eager_reason else "captured as a CUDA graph"
            )
        return "; ".join(parts)

    def state(self) -> dict[str, Any]:
        """What a continuation keeps: sizes of passes change the last bits."""
        return {"micro_batches": self.micro_batches, "device": self._device_name()}

    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of `state`, on a device of the same name; before `prepare`."""
        self.passes = []
        self.forget()
        self._stored = state["micro_batches"] if state.get("device") == self._device_name() else 0

    def _device_name(self) -> str:
        device = self._world.device
        return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
