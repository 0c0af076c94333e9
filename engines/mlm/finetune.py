"""A finetuning run of TinyLLaVA from start to finish."""

import gc
import hashlib
import math
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LlavaProcessor, TrainingArguments

from dataio.core.atomic import write_text
from dataio.core.errors import as_user_error
from dataio.core.log import log
from engines.config.mlm import FinetuneConfig
from engines.config.values import to_dict, to_yaml
from engines.mlm import deepspeed_config as zero
from engines.mlm.compiled_operators import announce_compilation
from engines.mlm.dataset import Collator, ConversationDataset
from engines.mlm.memory_estimate import check_memory, flops_per_token
from engines.mlm.model import load_model_to_tune, resolve_mlm_precision
from engines.mlm.output import answer_benchmarks, write_model
from engines.mlm.passes import Passes
from engines.mlm.prepare_data import conversations_digest, ensure_conversations, open_datasets
from engines.mlm.resume import (
    check_same_finetuning,
    find_checkpoint,
    make_universal,
    needs_universal,
    read_mark,
    steps_of,
)
from engines.mlm.trainer import FinetuneTrainer, RunCallback
from engines.mlm.trainer_arguments import training_arguments
from engines.runtime.command import EXIT_RUN_AGAIN
from engines.runtime.distributed import (
    StopRequest,
    World,
    init_distributed,
    on_all_ranks,
    on_rank0,
    shutdown_distributed,
)
from engines.runtime.run_folder import Outcome, run_in_folder
from engines.runtime.run_log import RunLog
from models.detector.flops import peak_flops
from models.tinyllava.checkpoint import ModelFolder, load_tinyllava, open_model_folder, save_tinyllava
from models.tinyllava.config import TINY
from models.tinyllava.text import load_tokenizer, make_processor


def run_finetuning(config: FinetuneConfig) -> int:
    """Start or resume a run; every rank calls this.

    Returns:
        0 if the run is finished, 75 if it was asked to stop and has saved a checkpoint.

    Raises:
        UserError: on every rank; exit.json has been written.
    """
    world = start_deepspeed()
    folder = Path(config.run.dir)

    def run() -> Outcome:
        outcome = _finetune(config, world, folder)
        shutdown_distributed(world)  # so that the other ranks end while rank 0 answers
        if outcome.code == 0 and world.is_main and config.evaluate.benchmarks:
            answer_benchmarks(config, folder, world.device)
        return outcome

    return run_in_folder(folder, world, run)


def start_deepspeed() -> World:
    """Initialize the process group and DeepSpeed's communication, also for a single process."""
    _stand_alone_environment()
    world = init_distributed()
    import deepspeed
    from torch.utils import cpp_extension

    if world.is_main and world.device.type == "cpu":
        waits = hasattr(cpp_extension, "FileBaton")
        announce_compilation(Path(os.environ["TORCH_EXTENSIONS_DIR"]), waits_for_file=waits)
    # Wraps the existing process group. Must run before from_pretrained: ZeRO-3 would otherwise
    # partition the weights as if this were the only process.
    deepspeed.init_distributed(verbose=False)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return world


def _stand_alone_environment() -> None:
    """Set the environment variables that a launcher sets and DeepSpeed needs even for one process."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1")))
    # DeepSpeed's launcher does not set it, and every process would start a thread on every core.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // local)))
    # DeepSpeed compiles its operators on first use with the ninja on PATH. Use this environment's,
    # even if it is not activated, and a build folder of its own: with a shared folder, each
    # environment would compile the operators again.
    os.environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
    environment = hashlib.sha256(sys.prefix.encode()).hexdigest()[:8]
    os.environ.setdefault(
        "TORCH_EXTENSIONS_DIR", str(Path.home() / ".cache" / "torch_extensions" / environment)
    )
    if "WORLD_SIZE" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(
        RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )


def _base_model(config: FinetuneConfig, folder: Path) -> None:
    """Write random:tiny's weights once, so that every rank, ZeRO stage and restart begins with the same."""
    base = folder / "base"
    if config.model.weights == TINY:
        if not (base / "config.json").is_file():
            model, processor = load_tinyllava(TINY, seed=config.run.seed)
            save_tinyllava(model, processor, base)
        config.model.weights = str(base)


@dataclass
class _Setup:
    """All that a run needs besides the model.

    Attributes:
        settings: DeepSpeed's. passes: of this process in a step.
        stored: the configuration as it was given, for the log and for resuming.
        checkpoint: to resume from, or None.
        source: folder of the weights to start from.
    """

    settings: dict[str, Any]
    precision: str
    passes: Passes
    stored: dict[str, Any]
    checkpoint: Path | None
    source: ModelFolder
    processor: LlavaProcessor
    train_set: ConversationDataset
    val_set: ConversationDataset | None

    @property
    def stage(self) -> int:
        return zero.stage_of(self.settings)


def _prepare(config: FinetuneConfig, world: World, folder: Path) -> _Setup:
    """Check everything that can be checked before the weights are loaded."""
    settings = on_all_ranks(world, lambda: zero.read_deepspeed(config.deepspeed))
    precision = on_all_ranks(world, lambda: resolve_mlm_precision(config.model.precision, world.device))
    stored = to_dict(config)
    checkpoint = on_all_ranks(world, lambda: find_checkpoint(config, folder / "checkpoints"))
    on_rank0(world, lambda: ensure_conversations(config))
    on_rank0(world, lambda: _base_model(config, folder))
    config.model.weights = str(folder / "base") if config.model.weights == TINY else config.model.weights
    source = on_all_ranks(world, lambda: _open(config))
    processor = make_processor(load_tokenizer(source.folder), source.config)
    train_set, val_set = open_datasets(config, world, folder, processor, source.config)
    longest = int(train_set.lengths.max())
    on_all_ranks(world, lambda: check_memory(config, source.config, settings, world, precision, longest))
    return _Setup(
        settings, precision, _passes(config, world), stored, checkpoint, source, processor, train_set, val_set
    )


@dataclass
class _Trained:
    """What remains of training once the model has left the memory.

    Attributes:
        step: of the last checkpoint. best: checkpoint of the lowest validation loss, or None.
        losses: of the logged steps.
    """

    stopped: bool
    reason: str
    step: int
    best: Path | None
    losses: list[float]


def _finetune(config: FinetuneConfig, world: World, folder: Path) -> Outcome:
    setup = _prepare(config, world, folder)
    trained = _train(config, world, folder, setup)
    gc.collect()  # the model is in reference cycles; merging and answering need its memory
    if trained.stopped:
        text = f"stopped at step {trained.step} ({trained.reason}); the same command continues"
        return Outcome(EXIT_RUN_AGAIN, text, trained.reason)
    chosen = trained.best or folder / "checkpoints" / f"checkpoint-{trained.step}"
    on_rank0(world, lambda: write_model(config, chosen, folder, setup.processor, setup.precision))
    if world.is_main:
        _say_end(trained.losses, chosen, folder)
    return Outcome(0, f"finished {trained.step} steps")


def _train(config: FinetuneConfig, world: World, folder: Path, setup: _Setup) -> _Trained:
    def arguments() -> TrainingArguments:
        count, checkpoints = len(setup.train_set), folder / "checkpoints"
        return training_arguments(
            config, checkpoints, setup.settings, setup.passes, setup.precision, world, count
        )

    # The arguments must exist before the model: ZeRO-3 reads them to partition it.
    trainer_arguments = arguments()
    model = on_all_ranks(world, lambda: load_model_to_tune(config, setup.precision, world.device))
    mark = {
        "world": world.size,
        "stage": setup.stage,
        "precision": setup.precision,
        "data": conversations_digest([conversation.sample for conversation in setup.train_set.conversations]),
        "config": setup.stored,
    }
    offset, wandb_id, checkpoint = 0, "", setup.checkpoint
    if checkpoint is not None:
        saved = on_all_ranks(world, lambda: read_mark(checkpoint))
        on_all_ranks(world, lambda: check_same_finetuning(config, saved, mark))
        offset, wandb_id = saved["metrics_offset"], saved["wandb_id"]
        if needs_universal(saved, world.size):
            on_rank0(world, lambda: make_universal(checkpoint))
            setup.settings["checkpoint"] = {"load_universal": True}
            trainer_arguments = arguments()
    if world.is_main:
        write_text(folder / "config.yaml", to_yaml(config))
    run_log = RunLog(
        folder,
        config.log,
        setup.stored,
        offset=offset,
        wandb_id=wandb_id,
        enabled=world.is_main,
        job_type="finetuning",
        data=str(mark["data"]),
    )
    callback = _make_callback(config, world, folder, setup, run_log, mark)
    trainer = _make_trainer(config, setup, model, trainer_arguments, callback)
    _say_start(config, world, trainer, setup)
    code = 1
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        engine = type(trainer.model_wrapped).__name__
        if engine != "DeepSpeedEngine":
            raise RuntimeError(f"trained by {engine}, expected DeepSpeedEngine")
        code = EXIT_RUN_AGAIN if callback.stopped else 0
    finally:
        run_log.close(code)
    if callback.stopped:
        callback.stop.clear_file()
    best = trainer.state.best_model_checkpoint
    return _Trained(
        callback.stopped,
        callback.stop.reason,
        steps_of(folder / "checkpoints")[-1],
        Path(best) if best else None,
        callback.losses,
    )


def _make_callback(
    config: FinetuneConfig, world: World, folder: Path, setup: _Setup, run_log: RunLog, mark: dict[str, Any]
) -> RunCallback:
    on_gpu = world.device.type == "cuda"
    return RunCallback(
        world=world,
        folder=folder,
        log=run_log,
        stop=StopRequest(world, folder),
        config=config,
        mark=mark,
        flops=flops_per_token(setup.source.config, config.tune),
        peak=peak_flops(torch.cuda.get_device_name(world.device), setup.precision) if on_gpu else None,
    )


def _make_trainer(
    config: FinetuneConfig,
    setup: _Setup,
    model: torch.nn.Module,
    arguments: TrainingArguments,
    callback: RunCallback,
) -> FinetuneTrainer:
    shape = setup.source.config
    trainer = FinetuneTrainer(
        config,
        setup.passes,
        model=model,
        args=arguments,
        train_dataset=setup.train_set,
        eval_dataset=setup.val_set,
        data_collator=Collator(shape.pad_token_id, shape.vision_config.image_size),
        processing_class=setup.processor,
        callbacks=[callback],
    )
    callback.trainer = trainer
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def _passes(config: FinetuneConfig, world: World) -> Passes:
    train = config.train
    return Passes.of(
        train.global_batch, train.micro_batch, rank=world.rank, world=world.size, loss=train.loss
    )


def _open(config: FinetuneConfig) -> ModelFolder:
    with as_user_error("model.weights "):
        return open_model_folder(config.model.weights)


def _say_start(config: FinetuneConfig, world: World, trainer: FinetuneTrainer, setup: _Setup) -> None:
    if not world.is_main:
        return
    # Under ZeRO-3 a parameter is empty between uses; its size is in `ds_numel`.
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in trainer.model.parameters()]
    learned, total = sum(size for size, learns in sizes if learns), sum(size for size, _ in sizes)
    batch, count = config.train.global_batch, len(setup.train_set)
    steps = config.train.steps or math.ceil(count // batch * config.train.epochs)
    names = "published names" if setup.source.published else "Hugging Face names"
    log.info(
        f"{config.run.dir}: DeepSpeed ZeRO-{setup.stage}{' offloaded' if zero.offloads(setup.settings) else ''}, "
        f"{world.size} x {world.device.type}, {setup.precision}\n"
        f"{setup.source.folder} ({names}): {learned:,} of {total:,} parameters learn (language "
        f"{config.tune.language}, connector {'full' if config.tune.connector else 'frozen'}, vision "
        f"{config.tune.vision})\n"
        f"{count} conversations, {len(setup.val_set or ())} for validation; {steps} steps of {batch}"
        + (f", the last {count % batch} of each epoch dropped" if count % batch else "")
    )


def _say_end(losses: Sequence[float], chosen: Path, folder: Path) -> None:
    if losses:
        part = max(1, len(losses) // 10)
        first, last = sum(losses[:part]) / part, sum(losses[-part:]) / part
        log.info(f"loss {first:.3f} at the start, {last:.3f} at the end")
    log.info(f"model: {folder / 'model'} (from {chosen.name})")
