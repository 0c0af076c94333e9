"""What a finetuning run would do, without a GPU and without a file written.

The checks are those of `engines.mlm.finetune`, in its order and with its messages; only the tensors of
the weights are not read.
"""

import math
from pathlib import Path

import torch
from transformers import LlavaConfig, LlavaProcessor

from dataio.core.errors import as_user_error
from engines.config.mlm import FinetuneConfig
from engines.mlm import deepspeed_config as zero
from engines.mlm.dataset import ConversationDataset
from engines.mlm.memory_estimate import GIB, check_memory, estimate_memory, learned_parameters
from engines.mlm.model import check_four_bits, check_vision_layers, resolve_mlm_precision
from engines.mlm.passes import Passes
from engines.mlm.prepare_data import conversations_digest, draws_conversations, open_datasets
from engines.mlm.resume import check_same_finetuning, find_checkpoint, needs_universal, read_mark
from engines.runtime.machine import GPU_RESERVE, Machine, format_duration
from engines.runtime.run_folder import check_run_folder
from models.tinyllava.checkpoint import load_tinyllava, open_model_folder
from models.tinyllava.config import TINY
from models.tinyllava.text import load_tokenizer, make_processor

_UNKNOWN_LENGTH = 1024  # tokens, where the conversations are still to be written


def plan_finetuning(config: FinetuneConfig, machine: Machine, rate: float | None = None) -> str:
    """The passes of each process, steps, memory, data and time of a run, and what its checks say.

    Args:
        rate: conversations/s of a process; None for unknown.

    Raises:
        UserError: what the run would raise before its first step.
    """
    folder, world = Path(config.run.dir), machine.first_process
    check_run_folder(folder)
    settings = zero.read_deepspeed(config.deepspeed)
    precision = resolve_mlm_precision(config.model.precision, world.device)
    checkpoint = find_checkpoint(config, folder / "checkpoints")
    shape, processor = _open_model(config, folder)
    drawn = draws_conversations(config)
    train_set: ConversationDataset | None = None
    val_set: ConversationDataset | None = None
    if not drawn:
        train_set, val_set = open_datasets(config, world, None, processor, shape)
    longest = _UNKNOWN_LENGTH if train_set is None else int(train_set.lengths.max())
    if machine.gpu_memory is not None or (machine.on_gpu and torch.cuda.is_available()):
        check_memory(config, shape, settings, world, precision, longest, machine.gpu_memory)
    check_four_bits(config.tune, world.device)
    check_vision_layers(config.tune, shape)
    need = estimate_memory(
        shape, config, settings, length=longest, world=machine.processes, precision=precision
    )
    resume, done = "no checkpoint, the run begins", 0
    if checkpoint is not None:
        saved = read_mark(checkpoint)
        if train_set is not None:
            data = conversations_digest([conversation.sample for conversation in train_set.conversations])
            now = {"stage": zero.stage_of(settings), "precision": precision, "data": data}
            check_same_finetuning(config, saved, now)
        done = int(saved["step"])
        other = (
            " through DeepSpeed's universal checkpoint" if needs_universal(saved, machine.processes) else ""
        )
        resume = f"continues after step {done}{other}"
    learned = sum(learned_parameters(shape, config.tune).values())
    offloaded = " offloaded" if zero.offloads(settings) else ""
    batch = config.train.global_batch
    return "\n".join(
        [
            f"{folder}: ZeRO-{zero.stage_of(settings)}{offloaded} on {machine}, {precision}",
            _data_line(config, train_set, val_set),
            *_batch_lines(config, machine),
            *_step_lines(config, machine, train_set, rate, done),
            f"learning rate: {config.optim.lr:g} at its peak",
            f"memory: about {(need.total + GPU_RESERVE) / GIB:.2f} GiB on each GPU, estimated for {longest} tokens: "
            f"weights {need.weights / GIB:.2f}, gradients {need.gradients / GIB:.2f}, optimizer "
            f"{need.optimizer / GIB:.2f}, buffers {need.buffers / GIB:.2f}, activations {need.activations / GIB:.2f}",
            f"reads: each node about {batch / machine.nodes:g} conversations of every step; all nodes read all of the "
            "text once",
            f"weights: {config.model.weights}, {learned:,} parameters learn",
            f"resume: {resume}",
            "all checks before the first step passed; the run's folder is as it was"
            if train_set is not None
            else "all checks that need no data passed; the run's folder is as it was",
        ]
    )


def _open_model(config: FinetuneConfig, folder: Path) -> tuple[LlavaConfig, LlavaProcessor]:
    if config.model.weights == TINY and not (folder / "base" / "config.json").is_file():
        model, processor = load_tinyllava(TINY, seed=config.run.seed)
        return model.config, processor
    weights = str(folder / "base") if config.model.weights == TINY else config.model.weights
    with as_user_error("model.weights "):
        source = open_model_folder(weights)
    return source.config, make_processor(load_tokenizer(source.folder), source.config)


def _data_line(
    config: FinetuneConfig, train_set: ConversationDataset | None, val_set: ConversationDataset | None
) -> str:
    if train_set is None:
        generate = config.data.generate
        return (
            f"data: {generate.questions} conversations about {generate.images} synthetic images will be written to "
            f"{config.data.conversations}"
        )
    return (
        f"data: {len(train_set)} conversations, {len(val_set or ())} for validation; "
        f"{int(train_set.lengths.sum()):,} tokens, the longest has {int(train_set.lengths.max())}"
    )


def _batch_lines(config: FinetuneConfig, machine: Machine) -> list[str]:
    train, world = config.train, machine.processes
    of_rank = [
        Passes.of(train.global_batch, train.micro_batch, rank=rank, world=world, loss=train.loss).parts
        for rank in range(world)
    ]
    shares = [sum(map(len, parts)) for parts in of_rank]
    largest = max(len(part) for parts in of_rank for part in parts)
    count, most, least = len(of_rank[0]), max(shares), min(shares)
    lines = [
        f"batch: {train.global_batch} conversations a step; each of {world} processes has "
        f"{most if most == least else f'{least} to {most}'}, in {count} pass{'es' if count > 1 else ''} of at most "
        f"{largest}"
    ]
    if idle := shares.count(0):
        lines.append(f"       {idle} processes have none, and run with others' labels ignored")
    return lines


def _step_lines(
    config: FinetuneConfig,
    machine: Machine,
    train_set: ConversationDataset | None,
    rate: float | None,
    done: int,
) -> list[str]:
    batch, world = config.train.global_batch, machine.processes
    if train_set is not None:
        steps = config.train.steps or math.ceil(len(train_set) // batch * config.train.epochs)
    elif config.train.steps:
        steps = config.train.steps
    else:
        return ["steps: as many as the conversations to be written give"]
    if rate is None:
        return [f"steps: {steps}", "time: unknown; give --rate, conversations/s of a process"]
    seconds = max(0, steps - done) * math.ceil(batch / world) / rate
    return [
        f"steps: {steps}",
        f"time: {format_duration(seconds)} at {rate:g} conversations/s of a process (given), without start, validation "
        "and communication",
    ]
