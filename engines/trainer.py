"""Training the detector: the loop, and what it takes to continue it exactly."""

import contextlib
import hashlib
import time
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dataio.errors import UserError
from dataio.index import ShardSet
from dataio.loader import Batch, Loader, TrainingOrder, evaluation_work, training_work
from engines.batchnorm import RunningStatistics
from engines.config import Config, to_dict
from engines.optim import build_optimizer, learning_rate
from engines.process import World
from engines.tally import FIELDS, Tally
from models.dual_head import DualHead, WeightsError, dual_head_loss, whiten_stem
from models.weights import load_weights

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Plan:
    """The run in steps: how many, per epoch, and every how many to validate and save."""

    total_steps: int
    steps_per_epoch: int
    validate_every: int
    save_every: int

    @classmethod
    def of(cls, config: Config, steps_per_epoch: int) -> "Plan":
        total = config.train.steps or max(1, round(config.train.epochs * steps_per_epoch))
        return cls(
            total,
            steps_per_epoch,
            config.train.validate_every or steps_per_epoch,
            config.checkpoint.every or steps_per_epoch,
        )

    def validates_after(self, step: int) -> bool:
        """Whether validation follows once `step` steps are done."""
        return step % self.validate_every == 0 or step == self.total_steps

    def saves_after(self, step: int) -> bool:
        return step % self.save_every == 0 or step == self.total_steps


def data_fingerprint(shards: ShardSet) -> str:
    """SHA-256 over the digests of a split's tars: equal data, wherever it lies."""
    digests = "".join(shard["sha256"] for shard in shards.shards)
    return hashlib.sha256(digests.encode()).hexdigest()


def resolve_precision(precision: str, device: torch.device) -> str:
    if precision != "auto":
        return precision
    return "bf16" if device.type == "cuda" else "fp32"


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
        self.micro_batches = self._share_of_micro_batches()
        self.order = TrainingOrder(train_set, config.data, config.run.seed, config.train.global_batch)
        self.plan = Plan.of(config, self.order.steps_per_epoch)
        self.precision = resolve_precision(config.train.precision, world.device)
        self.notes: list[str] = []
        self._make_deterministic()
        self.model = self._build_model()
        self.statistics = RunningStatistics(self.model)
        self.forward = self._wrap()
        self.optimizer = build_optimizer(self.model, config.optim)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=self.precision == "fp16")
        self.step = 0
        self.data_wait = 0.0
        self._meters = torch.zeros(len(FIELDS) + 1, dtype=torch.float64, device=world.device)
        # The first step whose gradient was not finite, -1 while there is none.
        self._bad_step = torch.full((), -1, dtype=torch.int64, device=world.device)
        # A GPU's host must not wait in every step: there the update is masked instead, and
        # the bad step reported at the next log.
        self.checks_every_step = world.device.type == "cpu"
        self._loader: Loader | None = None

    def _share_of_micro_batches(self) -> int:
        total = self.config.train.global_batch // self.config.train.micro_batch
        if total % self.world.size:
            fitting = [n for n in range(1, total + 1) if total % n == 0]
            raise UserError(
                f"{self.world.size} processes cannot share train.global_batch {self.config.train.global_batch} in "
                f"micro-batches of {self.config.train.micro_batch} evenly; use "
                f"{', '.join(map(str, fitting))} processes, or change train.micro_batch"
            )
        return total // self.world.size

    def _make_deterministic(self) -> None:
        # torchrun sets OMP_NUM_THREADS only for several processes, and the number of
        # threads changes the last bits: so it comes from the configuration, always.
        torch.set_num_threads(self.config.train.threads)
        if self.config.train.deterministic:
            torch.use_deterministic_algorithms(True)
            torch.backends.cudnn.benchmark = False
        else:
            torch.backends.cudnn.benchmark = True

    def _build_model(self) -> DualHead:
        config, labels = self.config, self.train_set.labels
        torch.manual_seed(config.run.seed)
        model = DualHead(config.model, labels.generators, labels.objects)
        if config.model.weights:
            try:
                report = load_weights(model, config.model.weights, config.model.backbone)
            except WeightsError as error:
                raise UserError(str(error)) from None
            self.notes.append(f"{config.model.weights}: {report}")
        layout = torch.channels_last if config.train.channels_last else torch.contiguous_format
        if config.model.whiten:
            whiten_stem(model, self._first_images())
        return model.to(self.world.device, memory_format=layout)  # type: ignore[call-overload]

    def _first_images(self, count: int = 2048) -> torch.Tensor:
        """The run's first images, cropped as in training, float [N, 3, size, size]; the same on every rank."""
        batch = self.config.train.micro_batch
        steps = min(self.order.steps_per_epoch, -(-count // self.config.train.global_batch))
        work = training_work(self.order, micro_batch=batch, rank=0, world=1, first_step=0, last_step=steps)
        loader = Loader(
            self.train_set, self.config.data, work, batch=batch, device=self.world.device, train=True
        )
        return torch.cat([loaded.image.cpu() for loaded in loader])

    def _wrap(self) -> nn.Module:
        wrapped: nn.Module = self.model
        if self.world.distributed and self.world.size > 1:
            with warnings.catch_warnings():
                # Newer versions rename broadcast_buffers; the old name works on all we support.
                warnings.simplefilter("ignore", FutureWarning)
                wrapped = DistributedDataParallel(
                    self.model,
                    device_ids=[self.world.device.index] if self.world.device.type == "cuda" else None,
                    broadcast_buffers=False,  # the running statistics are averaged, once per step
                    gradient_as_bucket_view=True,
                )
            self._settle_buckets(wrapped)
        return torch.compile(wrapped) if self.config.train.compile else wrapped  # type: ignore[return-value]

    def _settle_buckets(self, wrapped: nn.Module) -> None:
        """Let DDP rebuild its buckets before the first step instead of after it.

        DDP regroups its buckets once it has seen one backward pass. A resumed run would
        do so one step later than the undisturbed one, reduce in another order, and differ
        in the last bits on 4 ranks. Two passes of zero loss settle it beforehand.
        """
        self.statistics.begin_step()
        shape = (self.config.train.micro_batch, 3, self.config.data.size, self.config.data.size)
        image = torch.zeros(shape, device=self.world.device).contiguous(memory_format=torch.channels_last)
        for _ in range(2):
            generator_logits, object_logits = wrapped(image)
            (generator_logits.sum() * 0 + object_logits.sum() * 0).backward()
        self.model.zero_grad(set_to_none=True)
        self.statistics.restore()
        for name, buffer in self.model.named_buffers():
            if name.endswith("num_batches_tracked"):
                buffer.zero_()

    # ---- one step -------------------------------------------------------------------

    def _batches(self) -> Loader:
        if self._loader is None:
            work = training_work(
                self.order,
                micro_batch=self.config.train.micro_batch,
                rank=self.world.rank,
                world=self.world.size,
                first_step=self.step,
                last_step=self.plan.total_steps,
            )
            self._loader = Loader(
                self.train_set,
                self.config.data,
                work,
                batch=self.config.train.micro_batch,
                device=self.world.device,
                train=True,
            )
        return self._loader

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.world.device.type, PRECISIONS[self.precision])

    def _next_batch(self) -> Batch:
        begin = time.perf_counter()
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
        self.model.train()
        known_objects = max(1, self.order.known_objects(self.step))
        tally = Tally.empty(world.device)
        self.statistics.begin_step()
        for number in range(self.micro_batches):
            batch = self._next_batch()
            self.statistics.begin_micro_batch(number)
            last = number == self.micro_batches - 1
            with self._gradient_sync(last):
                with self._autocast():
                    generator_logits, object_logits = self.forward(batch.image)
                by_generator, by_object = dual_head_loss(
                    generator_logits,
                    object_logits,
                    batch.generator,
                    batch.object,
                    label_smoothing=config.loss.label_smoothing,
                )
                loss = (
                    config.loss.generator * by_generator / config.train.global_batch
                    + config.loss.object * by_object / known_objects
                )
                # DDP divides by the number of ranks; the loss is already a global mean.
                self.scaler.scale(loss * world.size).backward()
            with torch.no_grad():
                tally.add(generator_logits, object_logits, batch.generator, batch.object)
        self._update(tally)
        self.step += 1

    def _gradient_sync(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        if last or not isinstance(self.forward, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.forward.no_sync()

    def _update(self, tally: Tally) -> None:
        rate = learning_rate(self.config.optim, self.step, self.plan.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self._share_statistics(tally)
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        # The all-reduced gradient is the same everywhere: one rank's NaN is seen by all.
        bad = (
            ~torch.isfinite(norm) if not self.scaler.is_enabled() else ~torch.isfinite(tally.sums[-2:]).all()
        )
        self._bad_step = torch.where(bad & (self._bad_step < 0), self.step, self._bad_step)
        if self.checks_every_step:
            self.check_finite()
        if self.config.optim.clip:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), self.config.optim.clip, norm)
        if not self.scaler.is_enabled():
            # Fused optimisers skip the update on the device where this is not zero.
            self.optimizer.found_inf = (self._bad_step >= 0).float()  # type: ignore[attr-defined]
            self.optimizer.grad_scale = None  # type: ignore[attr-defined]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self._meters[:-1] += tally.sums
        self._meters[-1] = norm.double()

    def _share_statistics(self, tally: Tally) -> None:
        """Average the running statistics and sum the tally over ranks, in one collective."""
        if self.world.distributed and self.world.size > 1:
            packed = torch.cat([self.statistics.flat.double() / self.world.size, tally.sums])
            dist.all_reduce(packed)
            self.statistics.flat.copy_(packed[: len(self.statistics.flat)])
            tally.sums = packed[len(self.statistics.flat) :]
        self.statistics.end_step()

    def check_finite(self) -> None:
        """Stop all ranks if a gradient was not finite, naming the step and its samples.

        Raises:
            UserError: it was not.
        """
        step = int(self._bad_step.item())
        if step < 0:
            return
        ids = self.order.step_ids(step)
        shown = ", ".join(map(str, ids[:8]))
        raise UserError(
            f"step {step + 1}: the loss or its gradient is not finite; nothing was updated since. Sample ids of the "
            f"step: {shown}, ... ({len(ids)} in all). Lower optim.lr, set optim.clip, or look at these images"
        )

    def take_meters(self) -> dict[str, Any]:
        """Training metrics since the last call; waits for the device."""
        self.check_finite()
        weights = (self.config.loss.generator, self.config.loss.object)
        metrics = dict(Tally(self._meters[:-1]).metrics(weights))
        metrics["grad_norm"] = float(self._meters[-1])
        metrics["lr"] = self.optimizer.param_groups[0]["lr"]
        self._meters.zero_()
        return metrics

    # ---- validation -----------------------------------------------------------------

    @torch.no_grad()
    def validate(self) -> dict[str, float | None]:
        """Errors and loss on the validation split, every image exactly once."""
        assert self.val_set is not None
        self.model.eval()
        tally = Tally.empty(self.world.device)
        size = self.config.train.micro_batch
        work = evaluation_work(
            self.val_set, self.config.data, batch=size, rank=self.world.rank, world=self.world.size
        )
        for batch in Loader(
            self.val_set, self.config.data, work, batch=size, device=self.world.device, train=False
        ):
            with self._autocast():
                generator_logits, object_logits = self.model(batch.image)
            tally.add(generator_logits, object_logits, batch.generator, batch.object)
        weights = (self.config.loss.generator, self.config.loss.object)
        return tally.reduce(self.world).metrics(weights)

    # ---- state ----------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Everything a continuation needs, as tensors and plain values."""
        return {
            "step": self.step,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "meters": self._meters.cpu(),
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
        self._loader = None

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
