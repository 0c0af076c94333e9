"""A finetuning run's configuration as the arguments of Hugging Face's Trainer."""

from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from engines.config.mlm import FinetuneConfig
from engines.mlm.passes import Passes
from engines.runtime.distributed import World


def training_arguments(
    config: FinetuneConfig,
    checkpoints: Path,
    settings: dict[str, Any],
    passes: Passes,
    precision: str,
    world: World,
    count: int,
) -> TrainingArguments:
    """The run's configuration as the Trainer's arguments.

    Args:
        settings: DeepSpeed's. passes: of a process in a step.
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
        # All that this and the batch size mean here is how many passes a step has; see `FinetuneTrainer`.
        gradient_accumulation_steps=len(passes.parts),
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
