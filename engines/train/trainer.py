"""Training the detector: one step at a time, and the state that continues it exactly."""

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from dataio.loading.loader import Batch
from dataio.loading.trace import record_range
from dataio.shards.shard_set import ShardSet
from engines.config.detector import Config
from engines.runtime import fault_injection as faults
from engines.runtime.distributed import World
from engines.runtime.precision import resolve_precision
from engines.train.build import build_model, class_weights, make_deterministic
from engines.train.ema import WeightAverage
from engines.train.meters import FIELDS, MetricSums
from engines.train.nonfinite import NonFinite, is_bad, mask_update, write_dump
from engines.train.optim import build_optimizer, learning_rate
from engines.train.pass_runner import PassRunner
from engines.train.pass_step import HeldBatch
from engines.train.run_data import RunData
from engines.train.schedule import StepSchedule, data_fingerprint, share_of_micro_batches
from engines.train.selection import ModelSelection, SelectionUpdate, check_validation_exists
from engines.train.validate import Validation, validate
from models.detector.dual_head import DualHead
from models.detector.flops import training_flops

# Stages of a step for `on_progress`; see `engines.runtime.watchdog.HangWatchdog.tick`.
STEP_DONE, VALIDATING, TRAINING = 0, 1, 2


class Trainer:
    """Owns the model, the optimizer and the data; one `train_step` at a time.

    The unit of statistics is the micro-batch ("ghost batch"; Hoffer, Hubara & Soudry, "Train longer,
    generalize better", 2017, section 4): a step has global_batch / micro_batch of them, dealt out to
    the ranks, and a forward pass holds as many as fit. Any number of processes, and passes of any
    size, compute the same gradient, because each head's loss divides by its count of known labels
    in the *global* batch.

    Args:
        config: the run's. world: the processes. train_set, val_set: opened shards;
            val_set None where the validation split is empty.
        run_dir: where nonfinite.json is written; None for nowhere.
        on_progress: is called with (steps done, stage) at each pass.

    Attributes:
        step: steps done. runner: of the passes. meters: float64 [len(FIELDS) + 1] on the device: sums since the last
            `pop_metrics`, and the last gradient's norm.

    Raises:
        UserError: more processes than micro-batches, weights that do not fit, an epoch
            smaller than a batch.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        train_set: ShardSet,
        val_set: ShardSet | None,
        *,
        run_dir: Path | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.config, self.world = config, world
        self.train_set, self.val_set = train_set, val_set
        self._run_dir, self._on_progress = run_dir, on_progress
        self.micro_batches = share_of_micro_batches(config.train, world)
        self.precision = resolve_precision(config.train.precision, world.device)
        make_deterministic(config)
        check_validation_exists(config, train_set, val_set)
        self.data = RunData(config, world, train_set, val_set)
        self.order = self.data.order
        self.schedule = StepSchedule.of(config, self.order.steps_per_epoch)
        first_images = self.data.first_images() if config.model.whiten else None
        self.model, self.weight_report = build_model(config, train_set, world.device, first_images)
        # Before DDP's hooks are on the parameters.
        self.flops_per_image = training_flops(self.model, config.data.size)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=self.precision == "fp16")
        self.runner = PassRunner(
            config,
            world,
            self.micro_batches,
            self.model,
            precision=self.precision,
            scaler=self.scaler,
            class_weights=class_weights(config, train_set, world.device),
            gatherer=self.data.gatherer(),
        )
        self.statistics = self.runner.statistics
        self.average = WeightAverage(self.model, config.train.ema) if config.train.ema else None
        self.step = 0
        self._prepare_forward()
        self.selection = ModelSelection(config, self.order.steps_per_epoch)
        self.optimizer = build_optimizer(self.model, config.optim)
        self.meters = torch.zeros(len(FIELDS) + 1, dtype=torch.float64, device=world.device)
        self.nonfinite = NonFinite(config.train, world.device)
        # A GPU's host must not wait in every step: there the update is masked instead, and
        # the bad step reported at the next log.
        self.checks_every_step = world.device.type == "cpu"
        self._data_wait = 0.0
        self._batches: Iterator[Batch | HeldBatch] | None = None

    @property
    def epoch(self) -> float:
        """Passes over the training split that are done."""
        return self.step / self.schedule.steps_per_epoch

    @property
    def frozen(self) -> bool:
        """Whether only the heads learn in the step to come."""
        return self.step < self.schedule.frozen_steps

    def _prepare_forward(self) -> None:
        """Freeze or thaw the backbone."""
        self.model.freeze_backbone(self.frozen)
        self.runner.forget()

    def _thaw(self) -> None:
        """Let the backbone learn too from here on."""
        self.check_finite()  # before the set of gradients changes
        self._prepare_forward()
        if self.config.optim.name == "sgd" and self.config.optim.momentum:
            for parameter in self.model.parameters():
                # The fused update needs momentum buffers for all parameters of a group; zero is a fresh one.
                self.optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))

    def _set_training_mode(self) -> None:
        if self.model.training and self.model.backbone.training != self.frozen:
            return  # it takes a while for hundreds of modules
        self.model.train()
        if self.frozen:  # its running statistics must not change either
            self.model.backbone.eval()

    # ---- one step -------------------------------------------------------------------

    def prepare(self) -> None:
        """Settle the size of the passes, and capture them; all ranks call it together, after `load_state`.

        `train_step` does so where nobody did.
        """
        self._set_training_mode()
        self.runner.prepare()

    def batches(self) -> Iterator[Batch | HeldBatch]:
        """The passes that `train_step` takes, from the present step on."""
        if self._batches is None:
            self.prepare()
            load = self.data.held_batches if self.runner.cuts_out else self.data.training_batches
            self._batches = load(self.step, self.schedule.total_steps, self.runner.micro_batches)
        return self._batches

    def use_batches(self, batches: Iterator[Batch | HeldBatch]) -> None:
        """Let `train_step` take these instead; for benchmarks."""
        self._batches = batches

    def first_batch(self) -> Batch:
        """The first training images of the next step, as the network will see them (before mixing)."""
        size = min(self.config.train.micro_batch, max(1, self.config.log.images))
        return self.data.first_batch(self.step, size)

    def next_batch(self) -> Batch | HeldBatch:
        """The next of `batches`; the time it takes counts as waiting for data."""
        begin = time.perf_counter()
        faults.inject("data.next", self.step)
        batch = next(self.batches())
        self._data_wait += time.perf_counter() - begin
        return batch

    def train_step(self) -> None:
        """One optimizer step; on a GPU, nothing in it waits for the device.

        Everything here serves one rule: a step's result depends on the run's seed and the step's
        number, not on how many processes share it or how often the run was stopped.

        1. Gradients. Batch norm sees `micro_batch` images, whatever a pass holds and wherever it
           runs. Each head's summed loss is divided by its count of known labels in the *global* batch,
           which the order knows beforehand, so gradients of passes and ranks just add up.
           Randomness is drawn anew for each micro-batch from (seed, step, micro-batch).
        2. Synchronization. DDP reduces gradients with the last pass only; captured passes leave them
           in one tensor, which is reduced after the last. Batch statistics and metric sums travel
           together in one more collective.
        3. Update. A loss or gradient that is not finite is seen on the device, and the same on all
           ranks, since it is part of what was reduced. The update is then masked, not branched
           around: a branch would make the host wait for the device.

        Raises:
            UserError: the gradient is not finite (at once on a CPU, at the next
                `check_finite` on a GPU, with the update masked until then).
        """
        faults.inject("step.begin", self.step)
        self.tick(TRAINING)
        if self.step == self.schedule.frozen_steps > 0:
            self._thaw()
        self.prepare()
        known_objects = max(1, self.order.known_objects(self.step))
        self.runner.begin_step()
        for micro_batches in self.runner.passes:
            batch = self.next_batch()
            self.tick(TRAINING)
            self.runner.run(batch, micro_batches, step=self.step, known_objects=known_objects)
        with record_range("optimizer"):
            self._update()
        self.step += 1
        if self.average is not None:
            self.average.update(self.step)

    def _update(self) -> None:
        """Change the weights by the accumulated gradient, unless it is not finite."""
        rate = learning_rate(
            self.config.optim,
            self.step,
            self.schedule.total_steps,
            global_batch=self.config.train.global_batch,
            frozen_steps=self.schedule.frozen_steps,
            cuts=self.selection.cuts,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.runner.reduce()
        self.scaler.unscale_(self.optimizer)
        # As torch.nn.utils.get_total_norm, but each gradient's is kept for the report.
        gradients = {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}
        norms = torch.stack(torch._foreach_norm(list(gradients.values())))
        norm = torch.linalg.vector_norm(norms)
        bad = is_bad(norm, self.runner.sums.sums[-2:], self.scaler)
        masked = self.nonfinite.update_mask(bad, self.step, norms, list(gradients))
        sums = self.runner.sums.sums
        if self.nonfinite.skips:
            # A skipped step leaves no trace: neither in batch norm's statistics nor in the metrics.
            self.statistics.restore(masked)
            sums = torch.where(masked, 0.0, sums)
        if self.checks_every_step:
            self.check_finite()
        if self.config.optim.clip:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), self.config.optim.clip, norm)
        mask_update(self.optimizer, self.scaler, masked)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.runner.clear_gradients(self.optimizer)
        self.meters[:-1] += sums
        self.meters[-1] = norm.double()

    def check_finite(self) -> None:
        """Report a gradient that was not finite: its step, samples and norms.

        Raises:
            UserError: the run must stop, on all ranks alike.
        """
        bad_step = self.nonfinite.pop_bad_step()
        if bad_step is None:
            return
        ids = self.order.step_ids(bad_step.step).tolist()
        if self.world.is_main and self._run_dir is not None:
            scale = self.scaler.get_scale() if self.scaler.is_enabled() else 1.0
            write_dump(self._run_dir, bad_step, ids, list(self.model.named_parameters()), scale)
        self.nonfinite.report(bad_step, ids, warn=self.world.is_main)

    def tick(self, stage: int) -> None:
        """Report progress to `on_progress`."""
        if self._on_progress is not None:
            self._on_progress(self.step, stage)

    def pop_metrics(self) -> dict[str, Any]:
        """Training metrics since the last call; waits for the device."""
        self.check_finite()
        weights = (self.config.loss.generator, self.config.loss.object)
        both = not self.train_set.missing_class
        metrics: dict[str, Any] = dict(MetricSums(self.meters[:-1]).metrics(weights, both_classes=both))
        norm = float(self.meters[-1])
        metrics["grad_norm"] = norm if math.isfinite(norm) else None
        if self.nonfinite.skips:
            metrics["skipped"] = self.nonfinite.skipped
        metrics["lr"] = self.optimizer.param_groups[0]["lr"]
        self.meters.zero_()
        return metrics

    def pop_data_wait(self) -> float:
        """Seconds that `train_step` waited for batches since the last call."""
        seconds, self._data_wait = self._data_wait, 0.0
        return seconds

    # ---- validation -----------------------------------------------------------------

    @property
    def eval_model(self) -> DualHead:
        """The network that is validated and kept as best: the averaged one where there is one."""
        if self.average is not None:
            assert isinstance(self.average.module, DualHead)
            return self.average.module
        return self.model

    def validate(self) -> Validation:
        """Errors and loss of `eval_model` on the validation split."""
        assert self.val_set is not None
        with self.runner.step_of_pass.autocast():
            return validate(
                self.eval_model,
                self.val_set,
                self.config,
                self.world,
                self._each_validation_batch,
                batches=self.data.val_batches,
            )

    def _each_validation_batch(self) -> None:
        faults.inject("validation.batch", self.step)
        self.tick(VALIDATING)

    def update_selection(self, score: float) -> SelectionUpdate:
        """Let best.pt, the plateau schedule and early stopping see a validation's score (lower is better)."""
        return self.selection.update(score, self.step)

    # ---- state ----------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Everything a continuation needs: plain values, and tensors that training goes on to change."""
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "meters": self.meters,
            "skipped": self.nonfinite.skipped,
            **self.selection.state(),
            **({"ema": self.average.module.state_dict()} if self.average is not None else {}),
            "data": data_fingerprint(self.train_set),
            "precision": self.precision,
            "pass": self.runner.state(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of `state`. `data` and `precision` are compared by `check_same_run`."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.meters.copy_(state["meters"])
        self.step = state["step"]
        self.nonfinite.restore(state.get("skipped", 0))  # the first checkpoints do not have it
        self.selection.load_state(state)
        if self.average is not None:
            self.average.module.load_state_dict(state["ema"])
        self._batches = None
        self.runner.load_state(state.get("pass", {}))  # the first checkpoints do not have it
        if self.schedule.frozen_steps:
            self._prepare_forward()
