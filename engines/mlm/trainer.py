"""Hugging Face's Trainer with our order, per-part learning rates, log and checkpoints."""

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dataio.core.atomic import write_text
from dataio.core.errors import UserError
from dataio.core.log import log
from engines.config.mlm import FinetuneConfig
from engines.mlm.dataset import ConversationDataset, GlobalOrder
from engines.mlm.model import mlm_parameter_groups
from engines.mlm.passes import Passes, PassLoader, PassSampler
from engines.runtime.command import NonFiniteError
from engines.runtime.distributed import StopRequest, World
from engines.runtime.run_log import RunLog
from models.tinyllava.text import IGNORE

COMPLETE_FILE = "complete.json"  # written last; a checkpoint without it is incomplete
_UNFROZEN_FILE = (
    "trained_in_full.safetensors"  # parameters that learn besides adapters; PEFT does not save them
)


class FinetuneTrainer(Trainer):
    """The Trainer of one run.

    Args:
        settings: the run's configuration. passes: of this process in a step.
    """

    def __init__(self, settings: FinetuneConfig, passes: Passes, **kwargs: Any) -> None:
        self.optimizer: Any
        self.model: Any
        self.control: Any
        super().__init__(**kwargs)
        self._settings, self._passes = settings, passes
        # The Trainer itself says which backward pass ends a step, and accelerate only repeats that to
        # DeepSpeed; its own counter stays at 1, which it would warn of.
        self.accelerator.gradient_accumulation_steps = len(passes.parts)
        self.seen_tokens, self.seen_samples = 0, 0
        if settings.train.loss == "batches":
            # As the reference: average each micro-batch over its tokens, then the micro-batches.
            self.model_accepts_loss_kwargs = False

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The passes of this process, in order; see `engines.mlm.passes`."""
        data: ConversationDataset = self.train_dataset
        settings, args = self._settings, self.args
        lengths = data.lengths if settings.data.group_by_length else None
        batch = settings.train.global_batch
        order = GlobalOrder(len(data), batch, settings.run.seed, lengths)
        return PassLoader(
            data,
            PassSampler(order, batch, self._passes),
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
        )

    def create_optimizer(self, model: Any = None) -> Any:
        if self.optimizer is None:
            optim = self._settings.optim
            groups = mlm_parameter_groups(self.model if model is None else model, optim)
            # Also when its state is offloaded: with several learning rates, DeepSpeed's CPU AdamW
            # (0.19.8) does not take the same steps as this one.
            self.optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas)
        return self.optimizer

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.is_deepspeed_enabled:
            self._fix_universal_state()

    def _fix_universal_state(self) -> None:
        """Restore the parameter groups' settings after loading a universal ZeRO-3 checkpoint.

        DeepSpeed (seen in 0.19.8) gives all groups the first one's rate and decay, and one
        shared `step` tensor, which AdamW then increments once for each group.
        """
        optimizer = self.model_wrapped.optimizer.optimizer
        configured = mlm_parameter_groups(self.model, self._settings.optim)
        for group, settings, rate in zip(
            optimizer.param_groups, configured, self.lr_scheduler.get_last_lr(), strict=True
        ):
            group.update(lr=rate, initial_lr=settings["lr"], weight_decay=settings["weight_decay"])
        for state in optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].clone()

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        learned = (inputs["labels"] != IGNORE).any(1)  # not of a pass without conversations
        self.seen_tokens += int(inputs["attention_mask"][learned].sum())
        self.seen_samples += int(learned.sum())
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a pass, such that the mean over processes of the sum over passes is the step's."""
        slots = len(self._passes.parts) * self.args.world_size
        if self._settings.train.loss == "tokens" or slots == self._passes.units:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # Unequal numbers of micro-batches: the Trainer divides by the passes and DeepSpeed by the
        # processes, so by `slots`, some of which are empty.
        tokens = (inputs["labels"][:, 1:] != IGNORE).sum().clamp(min=1)  # an empty one's loss is 0, not NaN
        outputs = model(**inputs, num_items_in_batch=tokens, use_cache=False)
        loss = outputs.loss * (slots / self._passes.units)
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> Any:
        """Mean loss per learned token of the validation conversations.

        The Trainer's own method averages over batches, so its result depends on their size and
        on the number of processes. Every process runs the same number of batches, as ZeRO-3's
        collectives require: a process that has fewer repeats a conversation without counting it.
        """
        begun = time.perf_counter()
        data: Any = self.eval_dataset
        rank, size, batch = self.args.process_index, self.args.world_size, self.args.eval_batch_size
        sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        model = self.model_wrapped
        model.eval()  # DeepSpeed's eval() returns None
        for start in range(0, len(data), batch * size):
            places = range(start + rank * batch, start + (rank + 1) * batch)
            items = [data[place] for place in places if place < len(data)]
            inputs = self._prepare_inputs(self.data_collator(items or [data[0]]))
            with self.compute_loss_context_manager():
                count = torch.ones((), device=self.args.device)  # sums the loss over the tokens
                loss = model(**inputs, num_items_in_batch=count, use_cache=False).loss
            if items:
                sums[0] += loss.double()
                sums[1] += (inputs["labels"][:, 1:] != IGNORE).sum()
        if size > 1:
            torch.distributed.all_reduce(sums)
        metrics = {
            f"{metric_key_prefix}_loss": float(sums[0] / sums[1]),
            f"{metric_key_prefix}_runtime": time.perf_counter() - begun,
        }
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save and isinstance(self.model, PeftModel) and output_dir is not None:
            # Under ZeRO-3 only `state_dict` has the values; otherwise the model has them.
            values = state_dict if state_dict is not None else self.model.state_dict()
            names = [n for n, p in self.model.named_parameters() if p.requires_grad and ".lora_" not in n]
            unfrozen = {name_without_peft(name): values[name].detach().cpu().contiguous() for name in names}
            if unfrozen:
                save_file(unfrozen, Path(output_dir) / _UNFROZEN_FILE)


def name_without_peft(peft: str) -> str:
    """A parameter's name in the model that PEFT wraps."""
    return peft.removeprefix("base_model.model.").replace(".base_layer.", ".")


def load_unfrozen(model: torch.nn.Module, folder: Path) -> None:
    """Load the parameters that learned besides the adapters into a model without adapters."""
    if (folder / _UNFROZEN_FILE).is_file():
        tensors = load_file(folder / _UNFROZEN_FILE)
        missing = model.load_state_dict(tensors, strict=False)
        if missing.unexpected_keys:
            raise UserError(
                f"{folder / _UNFROZEN_FILE}: holds {missing.unexpected_keys[0]}, which the model lacks"
            )


class RunCallback(TrainerCallback):
    """Writes the log, marks checkpoints as complete, validates at the end, and stops all ranks together.

    Attributes:
        trainer: to be set once it exists. stopped: whether the run was stopped before its last step.
        losses: of the logged steps.

    Args:
        world, folder: of the run. log: of rank 0. stop: a pending request to stop.
        mark: what each checkpoint's mark records besides the step and the log's position.
        flops: FLOPs of one token, forward and backward. peak: FLOPs of the device per second, or None.
    """

    def __init__(
        self,
        *,
        world: World,
        folder: Path,
        log: RunLog,
        stop: StopRequest,
        config: FinetuneConfig,
        mark: dict[str, Any],
        flops: float,
        peak: float | None,
    ) -> None:
        self.world, self.folder, self.log, self.stop = world, folder, log, stop
        self.config, self.mark = config, mark
        self.flops, self.peak = flops, peak
        self.trainer: FinetuneTrainer
        self.stopped = False
        self.losses: list[float] = []
        self._clock, self._tokens, self._samples = time.perf_counter(), 0, 0

    def _on_step_end(self, state: TrainerState, control: TrainerControl) -> None:
        last = state.global_step >= state.max_steps
        if last:
            control.should_log = control.should_save = True
            control.should_evaluate = self.trainer.eval_dataset is not None
        if not last and self.stop.agreed():
            self.stopped = True
            control.should_save = control.should_training_stop = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        every = self.config.checkpoint.every
        if every and state.global_step % every == 0:
            control.should_save = True
        self._on_step_end(state, control)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Any = None,
        **_: Any,
    ) -> None:
        logs = dict(logs or {})
        if "loss" in logs:
            self._train_line(state, logs)
        elif "eval_loss" in logs:
            record = {"kind": "val", "step": state.global_step, "loss": logs["eval_loss"]}
            self.log.write(record, {"seconds": logs.get("eval_runtime", 0.0)})
            self._say(f"step {state.global_step} validation loss {logs['eval_loss']:.4f}")

    def _train_line(self, state: TrainerState, logs: dict[str, Any]) -> None:
        loss = float(logs["loss"])
        if not math.isfinite(loss):
            raise NonFiniteError(
                f"the loss is {loss} at step {state.global_step}; use a lower optim.lr, "
                "or model.precision bf16 in place of fp16"
            )
        self.losses.append(loss)
        trainer, now = self.trainer, time.perf_counter()
        seconds = max(now - self._clock, 1e-9)
        tokens = (trainer.seen_tokens - self._tokens) / seconds * self.world.size
        perf = {
            "samples_per_second": (trainer.seen_samples - self._samples) / seconds * self.world.size,
            "tokens_per_second": tokens,
        }
        if self.world.device.type == "cuda":
            perf["gpu_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        if self.peak:
            perf["mfu"] = tokens * self.flops / (self.peak * self.world.size)
        self._clock, self._tokens, self._samples = now, trainer.seen_tokens, trainer.seen_samples
        norm = logs.get("grad_norm")
        record = {
            "kind": "train",
            "step": state.global_step,
            "epoch": logs.get("epoch"),
            "loss": loss,
            "lr": logs.get("learning_rate"),
            "grad_norm": None if norm is None else float(norm),
        }
        self.log.write(record, perf)
        shown = "" if norm is None else f" norm {float(norm):.3g}"
        rate = f"{perf['samples_per_second']:.3g} samples/s, {tokens:.0f} tokens/s"
        self._say(
            f"step {state.global_step}/{state.max_steps} loss {loss:.4f} "
            f"lr {logs.get('learning_rate', 0):.3g}{shown} | {rate}"
        )

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Mark the checkpoint as complete, after every rank has written its part."""
        self.world.barrier()
        if self.world.is_main:
            path = self.folder / "checkpoints" / f"checkpoint-{state.global_step}"
            mark = {
                **self.mark,
                "step": state.global_step,
                "metrics_offset": self.log.committed_offset(),
                "wandb_id": self.log.wandb_id,
            }
            write_text(path / COMPLETE_FILE, json.dumps(mark, indent=2) + "\n")
        self.world.barrier()

    def _say(self, text: str) -> None:
        if self.world.is_main:
            log.info(text)
