"""A training run from start to end: prepare, resume, loop, save, finish."""

import gc
import json
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from dataio.core.atomic import write_text, write_with
from dataio.core.errors import UserError
from engines.audit.gate import audit_line
from engines.checkpoint import files as checkpoints
from engines.checkpoint.async_saver import Saver, snapshot
from engines.config.detector import Config, parse_range
from engines.config.values import to_dict, to_yaml
from engines.runtime import fault_injection as faults
from engines.runtime.command import EXIT_RUN_AGAIN
from engines.runtime.distributed import (
    StopRequest,
    World,
    init_distributed,
    on_all_ranks,
    on_rank0,
)
from engines.runtime.exit_file import write_exit
from engines.runtime.profiler import StepProfile
from engines.runtime.run_folder import Outcome, run_in_folder
from engines.runtime.run_log import RunLog
from engines.runtime.watchdog import HangWatchdog, LostRankError, is_lost_connection
from engines.train.open_data import ensure_shards, open_sets
from engines.train.resume import check_same_run, find_state
from engines.train.trainer import Trainer
from models.detector.flops import peak_flops

if TYPE_CHECKING:
    from engines.train.figures import RunFigures


def run_training(config: Config) -> int:
    """Train as `config` says, or continue; every rank calls this.

    Returns:
        0 when the run is finished, 75 when it was asked to stop and saved.

    Raises:
        UserError: on every rank alike; exit.json is written by then.
    """
    world = init_distributed()
    folder = Path(config.run.dir)
    return run_in_folder(folder, world, lambda: _train(config, world, folder))


def _train(config: Config, world: World, folder: Path) -> Outcome:
    on_rank0(world, lambda: ensure_shards(config))
    train_set, val_set = on_all_ranks(world, lambda: open_sets(config))
    audited = partial(audit_line, config.data.shards, required=config.data.require_audit)
    on_rank0(world, lambda: print(audited(), flush=True))
    store = checkpoints.CheckpointFolder(folder / "checkpoints", config.checkpoint.keep)
    state = on_all_ranks(world, lambda: find_state(config, world, store))
    if state is not None:
        on_all_ranks(world, lambda: check_same_run(config, world, state, train_set))
    trainer = on_all_ranks(world, lambda: Trainer(config, world, train_set, val_set))
    profile = on_all_ranks(
        world,
        lambda: StepProfile(parse_range(config.train.profile), trainer.schedule.total_steps, folder, world),
    )
    if state is not None:
        trainer.load_state(state)
    run = _Run(config, world, folder, store, trainer, state, profile)
    code, message = run.to_the_end()
    return Outcome(code, message, run.stop.reason if code == EXIT_RUN_AGAIN else "")


class _Run:
    """The loop's bookkeeping: when to log, validate, save and stop."""

    def __init__(
        self,
        config: Config,
        world: World,
        folder: Path,
        store: checkpoints.CheckpointFolder,
        trainer: Trainer,
        state: dict[str, Any] | None,
        profile: StepProfile,
    ) -> None:
        self.config, self.world, self.folder, self.store, self.trainer = config, world, folder, store, trainer
        self.profile = profile
        self.resumed_from = None if state is None else state["step"]
        self.best: dict[str, Any] = {} if state is None else state["best"]
        self.stop = StopRequest(world, folder)
        self.log = RunLog(
            folder,
            config.log,
            to_dict(config),
            offset=0 if state is None else state["metrics_offset"],
            wandb_id="" if state is None else state["wandb_id"],
            enabled=world.is_main and not self._finished(),
        )
        self.saver = Saver(store, folder / "best.pt", self.log.sync, background=config.checkpoint.background)
        trainer.folder = folder
        shows = config.log.images > 0 and world.is_main and not self._finished()
        self.panels: RunFigures | None = None
        if shows:
            from engines.train import figures as panels  # a second to import, for the process that draws

            self.panels = panels.RunFigures(folder, config, trainer.train_set.labels, self.log)
        self._clock = time.perf_counter()
        self._logged_step = trainer.step
        self._peak = (
            peak_flops(torch.cuda.get_device_name(world.device), trainer.precision)
            if world.device.type == "cuda"
            else None
        )

    def _finished(self) -> bool:
        return self.trainer.step >= self.trainer.schedule.total_steps or self.trainer.stalled

    def say(self, text: str) -> None:
        if self.world.is_main:
            print(text, flush=True)

    def to_the_end(self) -> tuple[int, str]:
        trainer = self.trainer
        if self._finished() and (self.folder / "final.safetensors").is_file():
            self.say(f"{self.folder}: already finished at step {trainer.step}")
            return 0, "already finished"
        self._introduce()
        # What lives as long as the run (modules, model, index) is not looked at again by each collection.
        gc.collect()
        gc.freeze()
        code = 1
        trainer.heartbeat = heartbeat = HangWatchdog(self.world, self.config.train.timeout, self._note_hang)
        try:
            code, message = self._loop()
            return code, message
        except RuntimeError as error:
            if not is_lost_connection(error):
                raise
            raise LostRankError(heartbeat.diagnose()) from error
        finally:
            gc.unfreeze()
            heartbeat.close()
            self._end_trace(None)
            self.saver.close()
            self.log.close(code)

    def _note_hang(self, message: str) -> None:
        if self.world.is_main:
            write_exit(self.folder, 1, message)

    def _introduce(self) -> None:
        config, schedule, trainer = self.config, self.trainer.schedule, self.trainer
        if self.world.is_main:
            write_text(self.folder / "config.yaml", to_yaml(config))
        val = len(trainer.val_set) if trainer.val_set else 0
        self.say(
            f"{self.folder}: {config.model.backbone}, {len(trainer.train_set)} training and {val} validation images, "
            f"{schedule.total_steps} steps of {config.train.global_batch} ({schedule.steps_per_epoch} per epoch, the "
            f"last {trainer.order.dropped} images of each epoch dropped), {self.world.size} x "
            f"{self.world.device.type}, {trainer.precision}"
        )
        if trainer.weight_report is not None:
            self.say(f"{config.model.weights}: {trainer.weight_report}; all names are in weights.txt")
            if self.world.is_main:
                write_text(self.folder / "weights.txt", trainer.weight_report.to_text())
        in_memory = [split for split in (trainer.train_in_memory, trainer.val_in_memory) if split is not None]
        if in_memory:
            mebibytes = sum(split.pixels.nbytes for split in in_memory) / 2**20
            self.say(
                f"data.resident: {mebibytes:.0f} MiB on {self.world.device} in each process, decoded in "
                f"{sum(split.seconds for split in in_memory):.1f} s"
            )
        if not trainer.val_set:
            self.say("no validation images: best.pt will be the last step's weights")
        if self.resumed_from is not None:
            self.say(f"continuing after step {self.resumed_from}")

    def _loop(self) -> tuple[int, str]:
        schedule, trainer = self.trainer.schedule, self.trainer
        saved = self.resumed_from
        if self.panels is not None and self.resumed_from is None:
            self.panels.inputs(trainer.first_batch(), trainer.step)
        while not self._finished():
            self.profile.before(trainer.step)
            trainer.train_step()
            step = trainer.step
            self._end_trace(step)
            trainer.beat(0)
            if step % schedule.steps_per_epoch == 0:
                faults.inject("epoch.end", step)
            if step % self.config.log.every == 0 or step == schedule.total_steps:
                self._log_training()
            if schedule.validates_after(step):
                self._validate()
            stalled = trainer.stalled
            # On a GPU the host runs ahead; asking every step would hold it back.
            asked = (step % 10 == 0 or self.world.device.type == "cpu") and self.stop.agreed()
            if schedule.saves_after(step) or asked or stalled:
                self._save()
                saved = step
            if stalled:
                return self._finish(f"stopped early after {step} of at most {schedule.total_steps} steps")
            if asked and step < schedule.total_steps:
                self._settle()
                self.stop.clear_file()
                self.say(f"stopped after step {step} ({self.stop.reason}); run the same command to continue")
                return EXIT_RUN_AGAIN, f"stopped after step {step}; run the same command to continue"
        if saved != trainer.step:
            self._save()
        return self._finish(f"finished {trainer.step} steps")

    def _end_trace(self, step: int | None) -> None:
        """Write the trace once its last step is done; in any case where `step` is None."""
        begin = time.perf_counter()
        path = self.profile.close() if step is None else self.profile.after(step)
        if path is not None:
            self._clock += time.perf_counter() - begin  # writing it is not training time
            self.say(f"trace of steps {self.config.train.profile}: {path}, for https://ui.perfetto.dev")

    def _finish(self, message: str) -> tuple[int, str]:
        if self.trainer.stalled:
            waited, metric = self.config.train.early_stop, self.config.checkpoint.best
            self.say(f"{message}: {waited} validations without improvement of {metric}")
        self._settle()
        self._export()
        if self.panels is not None:
            self.panels.curves()
        return 0, message

    def _settle(self) -> None:
        """Wait until all is written: what follows speaks of it."""
        on_all_ranks(self.world, lambda: self.saver.finish() if self.world.is_main else None)

    def _log_training(self) -> None:
        trainer, now = self.trainer, time.perf_counter()
        steps, seconds = trainer.step - self._logged_step, now - self._clock
        metrics = trainer.pop_metrics()
        epoch = trainer.step / trainer.schedule.steps_per_epoch
        rate = steps * self.config.train.global_batch / seconds
        flops = rate * trainer.flops_per_image
        perf = {
            "images_per_second": rate,
            "tflops": flops / 1e12,  # over all processes
            "data_wait_share": trainer.data_wait / seconds,
            "seconds": seconds,
            "memory_gib": _peak_memory_gib(self.world.device),
        }
        mfu = ""
        if self._peak:
            perf["mfu"] = flops / (self._peak * self.world.size)
            mfu = f", MFU {perf['mfu']:.1%}"
        self._clock, self._logged_step, trainer.data_wait = now, trainer.step, 0.0
        self.log.write({"kind": "train", "step": trainer.step, "epoch": round(epoch, 6), **metrics}, perf)
        self.say(
            f"step {trainer.step}/{trainer.schedule.total_steps} epoch {epoch:.2f} loss {metrics['loss']:.4f} "
            f"{_errors(metrics)} lr {metrics['lr']:.4g} norm {_norm(metrics['grad_norm'])} | "
            f"{rate:.0f} img/s, wait {perf['data_wait_share']:.1%}, {perf['memory_gib']:.1f} GiB{mfu}"
        )

    def _validate(self) -> None:
        trainer, begin = self.trainer, time.perf_counter()
        trainer.check_finite()
        found = trainer.validate() if trainer.val_set else None
        metrics = found.metrics if found else {}
        score = metrics.get(self.config.checkpoint.best)
        if score is None:
            # joint and object error need known objects; the loss always exists.
            score = metrics.get("loss") or -float(trainer.step)
        if not self.best or score < self.best["score"]:
            self.best = {"score": score, "step": trainer.step, "metric": self.config.checkpoint.best}
            if self.world.is_main:
                weights = trainer.weights_file(checkpoints.cpu_state(trainer.eval_model))
                self.saver.best({**_HEADER, **weights, "metrics": metrics})
        said = trainer.watch(score)
        faults.inject("validation.end", trainer.step)
        if found:
            self.log.write({"kind": "val", "step": trainer.step, **metrics}, {"seconds": _since(begin)})
            mark = " (best)" if self.best["step"] == trainer.step else ""
            self.say(f"step {trainer.step} validation loss {metrics['loss']:.4f} {_errors(metrics)}{mark}")
            if said:
                self.say(said)
            if self.panels is not None:
                self.panels.validation(found, trainer.step)
        self._clock += _since(begin)  # validation is not training time

    def _save(self) -> None:
        trainer = self.trainer
        trainer.check_finite()
        if not self.world.is_main:
            return
        begin = time.perf_counter()
        self.saver.checkpoint(
            checkpoint_state(
                trainer, best=self.best, metrics_offset=self.log.length, wandb_id=self.log.wandb_id
            )
        )
        self._clock += time.perf_counter() - begin

    def _export(self) -> None:
        if not self.world.is_main:
            return
        state = self.trainer.weights_file(checkpoints.cpu_state(self.trainer.eval_model))
        tensors = state.pop("model")
        metadata = {key: json.dumps(value) for key, value in {**_HEADER, **state}.items()}
        path = self.folder / "final.safetensors"
        faults.inject("export", self.trainer.step)
        try:
            write_with(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: could not be written ({error}); run the same command again") from None
        best = self.best
        why = f"{best['metric']} {best['score']:.4f}" if self.trainer.val_set else "the last"
        self.say(f"finished: {path}; best.pt is step {best['step']} ({why})")


def checkpoint_state(trainer: Trainer, **beside: Any) -> dict[str, Any]:
    """What a checkpoint holds, copied: training may go on while it is written.

    Args:
        beside: what the run knows and the trainer does not (best, metrics_offset, wandb_id).
    """
    return {
        **_HEADER,
        **trainer.weights_file(checkpoints.cpu_state(trainer.model)),
        **snapshot(trainer.state()),
        **beside,
    }


_HEADER = {"format": checkpoints.FORMAT, "version": checkpoints.VERSION}


def _since(begin: float) -> float:
    return time.perf_counter() - begin


def _norm(norm: float | None) -> str:
    return "not finite" if norm is None else f"{norm:.3g}"


def _errors(metrics: dict[str, Any]) -> str:
    names = (("generator", "gen"), ("real_fake", "real/fake"), ("object", "object"))
    parts = [
        f"{short} {metrics[f'{name}_error']:.2%}"
        for name, short in names
        if metrics[f"{name}_error"] is not None
    ]
    return "errors " + ", ".join(parts)


def _peak_memory_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
