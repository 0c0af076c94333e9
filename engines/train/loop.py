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
from dataio.core.log import log
from engines.audit.gate import audit_line
from engines.checkpoint import files as checkpoints
from engines.checkpoint.async_saver import Saver
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
from engines.runtime.peak_memory import peak_memory_bytes
from engines.runtime.profiler import StepProfile
from engines.runtime.run_folder import Outcome, run_in_folder
from engines.runtime.run_log import RunLog
from engines.runtime.watchdog import HangWatchdog, LostRankError, is_lost_connection
from engines.train.console import say, start_lines, start_warnings, training_line, validation_line
from engines.train.open_data import ensure_shards, open_sets
from engines.train.resume import as_begun, check_same_run, checkpoint_state, find_state, weights_file
from engines.train.schedule import data_fingerprint
from engines.train.trainer import STEP_DONE, Trainer
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
    on_rank0(world, lambda: log.info(audited()))
    store = checkpoints.CheckpointFolder(folder / "checkpoints", config.checkpoint.keep)
    state = on_all_ranks(world, lambda: find_state(config, world, store))
    if state is not None:
        on_all_ranks(world, lambda: check_same_run(config, world, state, train_set))
        config = as_begun(config, state)

    def on_hang(message: str) -> None:
        if world.is_main:
            write_exit(folder, 1, message)

    watchdog = HangWatchdog(world, config.train.timeout, folder, on_hang)
    trainer = on_all_ranks(
        world,
        lambda: Trainer(config, world, train_set, val_set, run_dir=folder, on_progress=watchdog.tick),
    )
    profile = on_all_ranks(
        world,
        lambda: StepProfile(parse_range(config.train.profile), trainer.schedule.total_steps, folder, world),
    )
    if state is not None:
        trainer.load_state(state)
    if _finished(trainer) and (folder / "final.safetensors").is_file():
        say(world, f"{folder}: already finished at step {trainer.step}")
        return Outcome(0, "already finished")
    on_all_ranks(world, trainer.prepare)
    return _Run(folder, store, trainer, watchdog, state, profile).to_the_end()


def _finished(trainer: Trainer) -> bool:
    return trainer.step >= trainer.schedule.total_steps or trainer.selection.early_stopped


class _Run:
    """The loop's bookkeeping: when to log, validate, save and stop."""

    def __init__(
        self,
        folder: Path,
        store: checkpoints.CheckpointFolder,
        trainer: Trainer,
        watchdog: HangWatchdog,
        state: dict[str, Any] | None,
        profile: StepProfile,
    ) -> None:
        config, world = trainer.config, trainer.world
        self.config, self.world, self.folder, self.trainer = config, world, folder, trainer
        self.watchdog, self.profile = watchdog, profile
        self.resumed_from = None if state is None else state["step"]
        self.stop = StopRequest(world, folder)
        shows = world.is_main and not _finished(trainer)
        self.log = RunLog(
            folder,
            config.log,
            to_dict(config),
            offset=0 if state is None else state["metrics_offset"],
            wandb_id="" if state is None else state["wandb_id"],
            enabled=shows,
            data=data_fingerprint(trainer.train_set),
        )
        self.saver = Saver(store, folder / "best.pt", self.log.sync, background=config.checkpoint.background)
        self.figures: RunFigures | None = None
        if config.log.images > 0 and shows:
            from engines.train import figures  # a second to import, for the process that draws

            self.figures = figures.RunFigures(folder, config, trainer.train_set.labels, self.log)
        self._clock = time.perf_counter()
        self._logged_step = trainer.step
        self._peak = (
            peak_flops(torch.cuda.get_device_name(world.device), trainer.precision)
            if world.device.type == "cuda"
            else None
        )

    def to_the_end(self) -> Outcome:
        """Train until the run is finished or asked to stop.

        Raises:
            LostRankError: another process ended or cannot be reached.
        """
        self._introduce()
        # Freeze long-lived objects (modules, model, index), so that the collector skips them.
        gc.collect()
        gc.freeze()
        code = 1
        self.watchdog.start()
        try:
            outcome = self._loop()
            code = outcome.code
            return outcome
        except RuntimeError as error:
            if not is_lost_connection(error):
                raise
            raise LostRankError(self.watchdog.diagnose()) from error
        finally:
            gc.unfreeze()
            self.watchdog.close()
            self._end_trace(None)
            self.saver.close()
            self.log.close(code)

    def _introduce(self) -> None:
        if self.world.is_main:
            write_text(self.folder / "config.yaml", to_yaml(self.config))
            report = self.trainer.weight_report
            if report is not None:
                write_text(self.folder / "weights.txt", report.to_text())
        for line in start_lines(self.trainer, self.resumed_from):
            say(self.world, line)
        for line in start_warnings(self.trainer) if self.world.is_main else ():
            log.warning(line)

    def _loop(self) -> Outcome:
        schedule, trainer = self.trainer.schedule, self.trainer
        saved_step = self.resumed_from
        if self.figures is not None and self.resumed_from is None:
            self.figures.inputs(trainer.first_batch(), trainer.step)
        while not _finished(trainer):
            self.profile.before(trainer.step)
            trainer.train_step()
            step = trainer.step
            self._end_trace(step)
            trainer.tick(STEP_DONE)
            if step % schedule.steps_per_epoch == 0:
                faults.inject("epoch.end", step)
            if step % self.config.log.every == 0 or step == schedule.total_steps:
                self._log_training()
            if schedule.validates_after(step):
                self._validate()
            early_stopped = trainer.selection.early_stopped
            # On a GPU the host runs ahead; asking every step would hold it back.
            asked = (step % 10 == 0 or self.world.device.type == "cpu") and self.stop.agreed()
            if schedule.saves_after(step) or asked or early_stopped:
                self._save()
                saved_step = step
            if early_stopped:
                return self._finish(f"stopped early after {step} of at most {schedule.total_steps} steps")
            if asked and step < schedule.total_steps:
                return self._stop()
        if saved_step != trainer.step:
            self._save()
        return self._finish(f"finished {trainer.step} steps")

    def _end_trace(self, step: int | None) -> None:
        """Write the trace once its last step is done; in any case where `step` is None."""
        begin = time.perf_counter()
        path = self.profile.close() if step is None else self.profile.after(step)
        if path is not None:
            self._clock += _since(begin)  # writing it is not training time
            say(
                self.world, f"trace of steps {self.config.train.profile}: {path}, for https://ui.perfetto.dev"
            )

    def _stop(self) -> Outcome:
        self._wait_for_saver()
        self.stop.clear_file()
        step, reason = self.trainer.step, self.stop.reason
        say(self.world, f"stopped after step {step} ({reason}); run the same command to continue")
        return Outcome(EXIT_RUN_AGAIN, f"stopped after step {step}; run the same command to continue", reason)

    def _finish(self, message: str) -> Outcome:
        if self.trainer.selection.early_stopped:
            waited, metric = self.config.train.early_stop, self.config.checkpoint.best
            say(self.world, f"{message}: {waited} validations without improvement of {metric}")
        self._wait_for_saver()
        self._export()
        if self.figures is not None:
            self.figures.curves()
        return Outcome(0, message)

    def _wait_for_saver(self) -> None:
        """Wait until everything is written, before the user reads that it is."""
        on_all_ranks(self.world, lambda: self.saver.finish() if self.world.is_main else None)

    def _log_training(self) -> None:
        trainer, now = self.trainer, time.perf_counter()
        steps, seconds = trainer.step - self._logged_step, now - self._clock
        metrics = trainer.pop_metrics()
        rate = steps * self.config.train.global_batch / seconds
        flops = rate * trainer.flops_per_image
        perf = {
            "images_per_second": rate,
            "tflops": flops / 1e12,  # over all processes
            "data_wait_share": trainer.pop_data_wait() / seconds,
            "seconds": seconds,
            "memory_gib": peak_memory_bytes(self.world.device) / 2**30,
        }
        if self._peak:
            perf["mfu"] = flops / (self._peak * self.world.size)
        self._clock, self._logged_step = now, trainer.step
        self.log.write(
            {"kind": "train", "step": trainer.step, "epoch": round(trainer.epoch, 6), **metrics}, perf
        )
        say(self.world, training_line(trainer, metrics, perf))

    def _validate(self) -> None:
        trainer, begin = self.trainer, time.perf_counter()
        trainer.check_finite()
        validation = trainer.validate() if trainer.val_set else None
        metrics = validation.metrics if validation else {}
        update = trainer.update_selection(trainer.selection.score_of(metrics, trainer.step))
        if update.is_best and self.world.is_main:
            weights = weights_file(trainer, checkpoints.cpu_state(trainer.eval_model))
            self.saver.best({**weights, "metrics": metrics})
        faults.inject("validation.end", trainer.step)
        if validation:
            self.log.write({"kind": "val", "step": trainer.step, **metrics}, {"seconds": _since(begin)})
            say(self.world, validation_line(trainer.step, metrics, is_best=update.is_best))
            if update.rate_cut:
                factor = self.config.optim.plateau_factor
                say(self.world, f"no improvement: the learning rate is multiplied by {factor}")
            if self.figures is not None:
                self.figures.validation(validation, trainer.step)
        self._clock += _since(begin)  # validation is not training time

    def _save(self) -> None:
        self.trainer.check_finite()
        if not self.world.is_main:
            return
        begin = time.perf_counter()
        state = checkpoint_state(self.trainer, metrics_offset=self.log.length, wandb_id=self.log.wandb_id)
        self.saver.checkpoint(state)
        self._clock += _since(begin)

    def _export(self) -> None:
        if not self.world.is_main:
            return
        trainer = self.trainer
        values = weights_file(trainer, checkpoints.cpu_state(trainer.eval_model))
        tensors = values.pop("model")
        metadata = {key: json.dumps(value) for key, value in values.items()}
        path = self.folder / "final.safetensors"
        faults.inject("export", trainer.step)
        try:
            write_with(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: could not be written ({error}); run the same command again") from None
        best = trainer.selection.best
        why = f"{best['metric']} {best['score']:.4f}" if trainer.val_set else "the last"
        say(self.world, f"finished: {path}; best.pt is step {best['step']} ({why})")


def _since(begin: float) -> float:
    return time.perf_counter() - begin
