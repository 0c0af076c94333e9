"""Training the detector: the loop, and what it takes to continue it exactly."""

import contextlib
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from dataio.core.counter_rng import PURPOSE_FORWARD, hash64
from dataio.core.errors import UserError
from dataio.loading.in_memory import InMemorySplit, preload
from dataio.loading.loader import Batch
from dataio.loading.open_loader import open_loader
from dataio.loading.trace import record_range
from dataio.loading.training_order import BatchSpec, TrainingOrder, training_specs
from dataio.shards.shard_set import ShardSet
from engines.config.detector import Config
from engines.config.values import to_dict
from engines.runtime import fault_injection as faults
from engines.runtime.distributed import World
from engines.runtime.precision import PRECISIONS, resolve_precision
from engines.runtime.watchdog import HangWatchdog
from engines.train.batchnorm import RunningStatistics
from engines.train.build import build_model, class_weights, make_deterministic, wrap
from engines.train.ema import WeightAverage
from engines.train.meters import FIELDS, MetricSums
from engines.train.mixup import mix
from engines.train.nonfinite import NonFinite, is_bad, mask_update, write_dump
from engines.train.open_data import open_quarantine
from engines.train.optim import Patience, build_optimizer, learning_rate
from engines.train.schedule import (
    StepSchedule,
    data_fingerprint,
    share_of_micro_batches,
)
from engines.train.validate import Validation, validate
from models.detector.dual_head import DualHead, dual_head_loss
from models.detector.flops import training_flops


class Trainer:
    """Owns the model, the optimiser and the data; one `step` at a time.

    The unit of computation is the micro-batch: a rank runs global_batch / micro_batch /
    world of them per step, and 1, 2 or 4 processes compute the same gradient, because
    each head's loss divides by its count of known labels in the *global* batch.

    Args:
        config: the run's. world: the processes. train_set, val_set: opened shards;
            val_set None where the validation split is empty.

    Raises:
        UserError: a global batch that the processes cannot share evenly, weights that do
            not fit, an epoch smaller than a batch.
    """

    def __init__(self, config: Config, world: World, train_set: ShardSet, val_set: ShardSet | None) -> None:
        self.config, self.world = config, world
        self.train_set, self.val_set = train_set, val_set
        self.micro_batches = share_of_micro_batches(config.train, world)
        self.order = TrainingOrder(train_set, config.data, config.run.seed, config.train.global_batch)
        self.schedule = StepSchedule.of(config, self.order.steps_per_epoch)
        self.precision = resolve_precision(config.train.precision, world.device)
        make_deterministic(config)
        self._check_watched()
        self.train_quarantine = open_quarantine(config, train_set)
        self.val_quarantine = open_quarantine(config, val_set)
        self.train_in_memory: InMemorySplit | None = None
        self.val_in_memory: InMemorySplit | None = None
        if config.data.resident:
            self.train_in_memory, self.val_in_memory = preload(
                config.data,
                world.device,
                train_set,
                val_set,
                train_quarantine=self.train_quarantine,
                val_quarantine=self.val_quarantine,
            )
        self.model, self.weight_report = build_model(
            config, train_set, self._open_training_loader, self.order, world.device
        )
        # Before DDP's hooks are on the parameters.
        self.flops_per_image = training_flops(self.model, config.data.size)
        self.statistics = RunningStatistics(self.model)
        self.average = WeightAverage(self.model, config.train.ema) if config.train.ema else None
        self.step = 0
        self._prepare_forward()
        self._class_weights = class_weights(config, train_set, world.device)
        # Each watches checkpoint.best's metric; the schedule's counts start anew with each cut.
        self.plateau = Patience(config.optim.plateau_threshold)
        self.patience = Patience(config.train.early_stop_threshold)
        self.cuts = 0
        self.optimizer = build_optimizer(self.model, config.optim)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=self.precision == "fp16")
        self.data_wait = 0.0
        self._meters = torch.zeros(len(FIELDS) + 1, dtype=torch.float64, device=world.device)
        self.nonfinite = NonFinite(config.train, world.device)
        # Where nonfinite.json goes, if anywhere, and who is told that this process goes on.
        self.folder: Path | None = None
        self.heartbeat: HangWatchdog | None = None
        # A GPU's host must not wait in every step: there the update is masked instead, and
        # the bad step reported at the next log.
        self.checks_every_step = world.device.type == "cpu"
        self._loader: Iterator[Batch] | None = None

    def _check_watched(self) -> None:
        for key, given in (
            ("optim.schedule plateau", self.config.optim.schedule == "plateau"),
            ("train.early_stop", self.config.train.early_stop > 0),
        ):
            if given and self.val_set is None:
                raise UserError(
                    f"{key}: watches validation, and {self.train_set.folder} has no val split; "
                    "shard with --val-fraction above 0, or choose another schedule"
                )

    @property
    def frozen(self) -> bool:
        """Whether only the heads learn in the step to come."""
        return self.step < self.schedule.frozen_steps

    def _prepare_forward(self) -> None:
        """Freeze or thaw the backbone, and wrap the model for it: DDP must know what has gradients."""
        self.model.freeze_backbone(self.frozen)
        self._set_training_mode()
        self.forward = wrap(self.model, self.config, self.world, self.statistics, self.config.data.size)

    def _thaw(self) -> None:
        """From here on the backbone learns too."""
        self.check_finite()  # before it knows other gradients
        self._prepare_forward()
        if self.config.optim.name == "sgd" and self.config.optim.momentum:
            for parameter in self.model.parameters():
                # The fused update wants momentum for all of a group or for none; zero is none.
                self.optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))

    def _set_training_mode(self) -> None:
        self.model.train()
        if self.frozen:  # its running statistics stay, too
            self.model.backbone.eval()

    # ---- one step -------------------------------------------------------------------

    def _batches(self) -> Iterator[Batch]:
        if self._loader is None:
            work = training_specs(
                self.order,
                micro_batch=self.config.train.micro_batch,
                rank=self.world.rank,
                world=self.world.size,
                first_step=self.step,
                last_step=self.schedule.total_steps,
                announce=self.train_in_memory is None,
            )
            self._loader = self._open_training_loader(work, self.config.train.micro_batch)
        return self._loader

    def _open_training_loader(self, work: Iterator[BatchSpec], batch: int) -> Iterator[Batch]:
        return open_loader(
            self.train_set,
            self.config.data,
            work,
            batch=batch,
            device=self.world.device,
            train=True,
            quarantine=self.train_quarantine,
            in_memory=self.train_in_memory,
        )

    def first_batch(self) -> Batch:
        """The first training images of the next step, as the network will see them (before mixing)."""
        size = min(self.config.train.micro_batch, max(1, self.config.log.images))
        work = iter([self.order.work(self.step, 0, size)])
        return next(self._open_training_loader(work, size))

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.world.device.type, PRECISIONS[self.precision])

    def _next_batch(self) -> Batch:
        begin = time.perf_counter()
        faults.inject("data.next", self.step)
        batch = next(self._batches())
        self.data_wait += time.perf_counter() - begin
        return batch

    def train_step(self) -> None:
        """One optimiser step; on a GPU, nothing in it waits for the device.

        Raises:
            UserError: the gradient is not finite (at once on a CPU, at the next
                `check_finite` on a GPU, with the update masked until then).
        """
        config, world = self.config, self.world
        faults.inject("step.begin", self.step)
        self.beat()
        if self.step == self.schedule.frozen_steps > 0:
            self._thaw()
        self._set_training_mode()
        known_objects = max(1, self.order.known_objects(self.step))
        tally = MetricSums.empty(world.device)
        self.statistics.begin_step()
        for number in range(self.micro_batches):
            batch = self._next_batch()
            self.beat()
            self.statistics.begin_micro_batch(number)
            place = world.rank * self.micro_batches + number
            # Dropout and the like draw from torch's generator: the same for this micro-batch
            # on any number of processes, and after a resume.
            torch.manual_seed(int(hash64(config.run.seed, self.step, PURPOSE_FORWARD, place)) >> 1)
            with record_range("augment"):
                image, own = mix(
                    config.mix, batch.image, seed=config.run.seed, step=self.step, micro_batch=place
                )
            with self._gradient_sync(number == self.micro_batches - 1):
                with record_range("forward"), self._autocast():
                    generator_logits, object_logits = self.forward(image)
                generator_logits = faults.corrupt_logits(generator_logits, self.step)
                by_generator, by_object = dual_head_loss(
                    generator_logits,
                    object_logits,
                    batch.generator,
                    batch.object,
                    label_smoothing=config.loss.label_smoothing,
                    generator_weights=self._class_weights,
                    own_share=own,
                )
                loss = (
                    config.loss.generator * by_generator / config.train.global_batch
                    + config.loss.object * by_object / known_objects
                )
                # DDP divides by the number of ranks; the loss is already a global mean.
                with record_range("backward"):
                    self.scaler.scale(loss * world.size).backward()
            with torch.no_grad():
                tally.add(generator_logits, object_logits, batch.generator, batch.object)
        with record_range("optimizer"):
            self._update(tally)
        self.step += 1
        if self.average is not None:
            self.average.update(self.step)

    def _gradient_sync(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        if last or not isinstance(self.forward, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.forward.no_sync()

    def _update(self, tally: MetricSums) -> None:
        rate = learning_rate(
            self.config.optim,
            self.step,
            self.schedule.total_steps,
            frozen_steps=self.schedule.frozen_steps,
            cuts=self.cuts,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self._share_statistics(tally)
        self.scaler.unscale_(self.optimizer)
        # As torch.nn.utils.get_total_norm, but each gradient's is kept for the report.
        gradients = {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}
        norms = torch.stack(torch._foreach_norm(list(gradients.values())))
        norm = torch.linalg.vector_norm(norms)
        bad = is_bad(norm, tally.sums[-2:], self.scaler)
        masked = self.nonfinite.judge(bad, self.step, norms, list(gradients))
        sums = tally.sums
        if self.nonfinite.skips:
            self.statistics.restore(masked)
            sums = torch.where(masked, 0.0, sums)
        if self.checks_every_step:
            self.check_finite()
        if self.config.optim.clip:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), self.config.optim.clip, norm)
        mask_update(self.optimizer, self.scaler, masked)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self._meters[:-1] += sums
        self._meters[-1] = norm.double()

    def _share_statistics(self, tally: MetricSums) -> None:
        """Average the running statistics and sum the tally over ranks, in one collective."""
        if self.world.distributed and self.world.size > 1:
            packed = torch.cat([self.statistics.flat.double() / self.world.size, tally.sums])
            dist.all_reduce(packed)
            self.statistics.flat.copy_(packed[: len(self.statistics.flat)])
            tally.sums = packed[len(self.statistics.flat) :]
        self.statistics.end_step()

    def check_finite(self) -> None:
        """Report a gradient that was not finite: its step, samples and norms.

        Raises:
            UserError: the run must stop, on all ranks alike.
        """
        found = self.nonfinite.look()
        if found is None:
            return
        ids = self.order.step_ids(found.step).tolist()
        if self.world.is_main and self.folder is not None:
            scale = self.scaler.get_scale() if self.scaler.is_enabled() else 1.0
            write_dump(self.folder, found, ids, list(self.model.named_parameters()), scale)
        self.nonfinite.report(found, ids, say=self.world.is_main)

    def beat(self, stage: int = 2) -> None:
        """Tell whoever watches that this process goes on; see `engines.runtime.watchdog`."""
        if self.heartbeat is not None:
            self.heartbeat.beat(self.step, stage)

    def pop_metrics(self) -> dict[str, Any]:
        """Training metrics since the last call; waits for the device."""
        self.check_finite()
        weights = (self.config.loss.generator, self.config.loss.object)
        metrics = dict(MetricSums(self._meters[:-1]).metrics(weights))
        norm = float(self._meters[-1])
        metrics["grad_norm"] = norm if math.isfinite(norm) else None
        if self.nonfinite.skips:
            metrics["skipped"] = self.nonfinite.skipped
        metrics["lr"] = self.optimizer.param_groups[0]["lr"]
        self._meters.zero_()
        return metrics

    # ---- validation -----------------------------------------------------------------

    @property
    def eval_model(self) -> DualHead:
        """The network that is validated and kept as best: the averaged one where there is one."""
        if self.average is not None:
            assert isinstance(self.average.module, DualHead)
            return self.average.module
        return self.model

    def validate(self) -> Validation:
        """Errors and loss of the judged weights on the validation split."""
        assert self.val_set is not None
        with self._autocast():
            return validate(
                self.eval_model,
                self.val_set,
                self.config,
                self.world,
                self._each_validation_batch,
                quarantine=self.val_quarantine,
                in_memory=self.val_in_memory,
            )

    def _each_validation_batch(self) -> None:
        faults.inject("validation.batch", self.step)
        self.beat(1)

    def watch(self, score: float) -> str:
        """Let schedule and early stopping see a validation's score (lower is better).

        Returns:
            what follows for the user to read, "" for nothing; `stalled` says whether to stop.
        """
        config = self.config
        said = ""
        if config.optim.schedule == "plateau":
            self.plateau.see(score)
            if self.plateau.waited > config.optim.plateau_patience:
                self.plateau.waited, self.cuts = 0, self.cuts + 1
                said = f"no improvement: the learning rate is multiplied by {config.optim.plateau_factor}"
        if self.step > config.train.early_stop_after * self.schedule.steps_per_epoch:
            self.patience.see(score)
        return said

    @property
    def stalled(self) -> bool:
        """Whether early stopping has waited long enough."""
        return 0 < self.config.train.early_stop <= self.patience.waited

    # ---- state ----------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Everything a continuation needs, as tensors (that training goes on to change) and plain values."""
        return {
            "step": self.step,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "meters": self._meters,
            "cuts": self.cuts,
            "skipped": self.nonfinite.skipped,
            "plateau": vars(self.plateau).copy(),
            "patience": vars(self.patience).copy(),
            **({"ema": self.average.module.state_dict()} if self.average is not None else {}),
            "data": data_fingerprint(self.train_set),
            "precision": self.precision,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of `state` and of the model's weights beside it."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self._meters.copy_(state["meters"])
        self.step = state["step"]
        # The first checkpoints have none of these.
        self.cuts = state.get("cuts", 0)
        self.nonfinite.load(state.get("skipped", 0))
        vars(self.plateau).update(state.get("plateau", {}))
        vars(self.patience).update(state.get("patience", {}))
        if self.average is not None:
            self.average.module.load_state_dict(state["ema"])
        self._loader = None
        if self.schedule.frozen_steps:
            self._prepare_forward()

    def weights_file(self, model_state: dict[str, torch.Tensor]) -> dict[str, Any]:
        """The part of a checkpoint that evaluation and prediction need."""
        labels = self.train_set.labels
        return {
            "step": self.step,
            "model": model_state,
            "labels": {"generators": list(labels.generators), "objects": list(labels.objects)},
            "codec": self.train_set.manifest["codec"],
            "layout": self.train_set.manifest["layout"],
            "config": to_dict(self.config),
        }
