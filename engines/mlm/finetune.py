"""A finetuning run of TinyLLaVA from start to finish."""

import gc
import hashlib
import math
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import TrainingArguments

from dataio.core.atomic import write_text
from dataio.core.errors import UserError, as_user_error
from dataio.core.log import log
from engines.config.mlm import FinetuneConfig
from engines.config.values import to_dict, to_yaml
from engines.mlm import deepspeed_config as zero
from engines.mlm.dataset import Collator
from engines.mlm.memory_estimate import check_memory, flops_per_token
from engines.mlm.model import load_model_to_tune, resolve_mlm_precision
from engines.mlm.output import answer_benchmarks, write_model
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


def _finetune(config: FinetuneConfig, world: World, folder: Path) -> Outcome:
    settings = on_all_ranks(world, lambda: zero.read_deepspeed(config.deepspeed))
    stage = zero.stage_of(settings)
    precision = on_all_ranks(world, lambda: resolve_mlm_precision(config.model.precision, world.device))
    accumulation = on_all_ranks(world, lambda: _accumulation(config, world.size))
    stored = to_dict(config)
    checkpoints = folder / "checkpoints"
    checkpoint = on_all_ranks(world, lambda: find_checkpoint(config, checkpoints))
    on_rank0(world, lambda: ensure_conversations(config))
    on_rank0(world, lambda: _base_model(config, folder))
    config.model.weights = str(folder / "base") if config.model.weights == TINY else config.model.weights
    source = on_all_ranks(world, lambda: _open(config))
    processor = make_processor(load_tokenizer(source.folder), source.config)
    train_set, val_set = open_datasets(config, world, folder, processor, source.config)
    longest = int(train_set.lengths.max())
    on_all_ranks(world, lambda: check_memory(config, source.config, settings, world, precision, longest))
    arguments = training_arguments(
        config, checkpoints, settings, accumulation, precision, world, len(train_set)
    )
    # The arguments must exist before the model: ZeRO-3 reads them to partition it.
    model = on_all_ranks(world, lambda: load_model_to_tune(config, precision, world.device))
    mark = {
        "world": world.size,
        "stage": stage,
        "precision": precision,
        "data": conversations_digest([conversation.sample for conversation in train_set.conversations]),
        "config": stored,
    }
    offset, wandb_id = 0, ""
    if checkpoint is not None:
        saved = on_all_ranks(world, lambda: read_mark(checkpoint))
        on_all_ranks(world, lambda: check_same_finetuning(config, saved, mark))
        offset, wandb_id = saved["metrics_offset"], saved["wandb_id"]
        if needs_universal(saved, world.size):
            on_rank0(world, lambda: make_universal(checkpoint))
            settings["checkpoint"] = {"load_universal": True}
            arguments = training_arguments(
                config, checkpoints, settings, accumulation, precision, world, len(train_set)
            )
    if world.is_main:
        write_text(folder / "config.yaml", to_yaml(config))
    log = RunLog(folder, config.log, stored, offset=offset, wandb_id=wandb_id, enabled=world.is_main)
    callback = RunCallback(
        world=world,
        folder=folder,
        log=log,
        stop=StopRequest(world, folder),
        config=config,
        mark=mark,
        flops=flops_per_token(source.config, config.tune),
        peak=peak_flops(torch.cuda.get_device_name(world.device), precision)
        if world.device.type == "cuda"
        else None,
    )
    trainer = FinetuneTrainer(
        config,
        model=model,
        args=arguments,
        train_dataset=train_set,
        eval_dataset=val_set,
        data_collator=Collator(source.config.pad_token_id, source.config.vision_config.image_size),
        processing_class=processor,
        callbacks=[callback],
    )
    callback.trainer = trainer
    trainer.remove_callback(transformers.PrinterCallback)
    kind = f"ZeRO-{stage}{' offloaded' if zero.offloads(settings) else ''}"
    _say_start(config, world, trainer, len(train_set), len(val_set or ()), kind, precision, source)
    code = 1
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        engine = type(trainer.model_wrapped).__name__
        if engine != "DeepSpeedEngine":
            raise RuntimeError(f"trained by {engine}, expected DeepSpeedEngine")
        code = EXIT_RUN_AGAIN if callback.stopped else 0
    finally:
        log.close(code)
    best = trainer.state.best_model_checkpoint
    last = steps_of(checkpoints)[-1]
    del callback.trainer, trainer, model
    gc.collect()
    if callback.stopped:
        callback.stop.clear_file()
        reason = callback.stop.reason
        return Outcome(
            EXIT_RUN_AGAIN, f"stopped at step {last} ({reason}); the same command continues", reason
        )
    chosen = Path(best) if best else checkpoints / f"checkpoint-{last}"
    on_rank0(world, lambda: write_model(config, chosen, folder, processor, precision))
    if world.is_main:
        _say_end(callback.losses, chosen, folder)
    return Outcome(0, f"finished {last} steps")


def _accumulation(config: FinetuneConfig, size: int) -> int:
    micro, batch = config.train.micro_batch, config.train.global_batch
    if batch % (micro * size):
        raise UserError(
            f"train.global_batch is {batch}, expected a multiple of train.micro_batch {micro} times {size} "
            "processes"
        )
    return batch // (micro * size)


def _open(config: FinetuneConfig) -> ModelFolder:
    with as_user_error("model.weights "):
        return open_model_folder(config.model.weights)


def training_arguments(
    config: FinetuneConfig,
    checkpoints: Path,
    settings: dict[str, Any],
    accumulation: int,
    precision: str,
    world: World,
    count: int,
) -> TrainingArguments:
    """The run's configuration as the Trainer's arguments.

    Args:
        settings: DeepSpeed's. accumulation: micro-batches of a process per step.
        count: number of training conversations.
    """
    train, optim = config.train, config.optim
    on_gpu = world.device.type == "cuda"
    schedule = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}[optim.schedule]
    # In steps, not epochs: the last step would otherwise validate and save twice.
    validate = train.validate_every or count // train.global_batch
    return TrainingArguments(
        output_dir=str(checkpoints),
        # Without it, accelerate sees no processes on a CPU and uses plain DDP.
        use_cpu=not on_gpu,
        deepspeed=settings,
        seed=config.run.seed,
        per_device_train_batch_size=train.micro_batch,
        per_device_eval_batch_size=train.micro_batch,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=train.epochs,
        max_steps=train.steps or -1,
        learning_rate=optim.lr,
        adam_beta1=optim.betas[0],
        adam_beta2=optim.betas[1],
        weight_decay=optim.weight_decay,
        max_grad_norm=optim.clip,
        lr_scheduler_type=schedule,
        warmup_steps=optim.warmup,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        activation_checkpointing=train.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if train.gradient_checkpointing else None,
        logging_steps=config.log.every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if _validates(config) else "no",
        eval_steps=validate,
        save_strategy="steps",
        save_steps=validate,
        # The Trainer deletes the oldest checkpoint before `on_save` marks the new one as complete:
        # with a limit of 1 there would be a moment without a complete checkpoint.
        save_total_limit=max(2, config.checkpoint.keep),
        metric_for_best_model="loss",
        greater_is_better=False,
        load_best_model_at_end=False,
        prediction_loss_only=True,
        label_names=["labels"],
        remove_unused_columns=False,
        dataloader_num_workers=config.data.workers,
        dataloader_pin_memory=on_gpu,
        report_to="none",
        disable_tqdm=True,
    )


def _validates(config: FinetuneConfig) -> bool:
    return bool(config.data.val) or config.data.val_fraction > 0


def _say_start(
    config: FinetuneConfig,
    world: World,
    trainer: FinetuneTrainer,
    count: int,
    held: int,
    zero_kind: str,
    precision: str,
    source: ModelFolder,
) -> None:
    if not world.is_main:
        return
    # Under ZeRO-3 a parameter is empty between uses; its size is in `ds_numel`.
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in trainer.model.parameters()]
    learned, total = sum(size for size, learns in sizes if learns), sum(size for size, _ in sizes)
    batch = config.train.global_batch
    steps = config.train.steps or math.ceil(count // batch * config.train.epochs)
    kind = "published names" if source.published else "Hugging Face names"
    log.info(
        f"{config.run.dir}: DeepSpeed {zero_kind}, "
        f"{world.size} x {world.device.type}, {precision}\n"
        f"{source.folder} ({kind}): {learned:,} of {total:,} parameters learn (language {config.tune.language}, "
        f"connector {'full' if config.tune.connector else 'frozen'}, vision {config.tune.vision})\n"
        f"{count} conversations, {held} for validation; {steps} steps of {batch}"
        + (f", the last {count % batch} of each epoch dropped" if count % batch else "")
    )


def _say_end(losses: Sequence[float], chosen: Path, folder: Path) -> None:
    if losses:
        part = max(1, len(losses) // 10)
        first, last = sum(losses[:part]) / part, sum(losses[-part:]) / part
        log.info(f"loss {first:.3f} at the start, {last:.3f} at the end")
    log.info(f"model: {folder / 'model'} (from {chosen.name})")
