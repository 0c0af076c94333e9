"""What a training run would do, without a GPU and without a file written.

The checks are those of `engines.train.loop`, in its order and with its messages.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dataio.core.errors import as_user_error
from dataio.loading.in_memory import held_bytes
from dataio.loading.training_order import TrainingOrder, micro_batches_of
from dataio.shards.shard_set import ShardSet
from dataio.shards.shard_table import shard_counts
from dataio.sources.remote_path import is_url
from engines.audit.gate import audit_line
from engines.checkpoint.files import CheckpointFolder
from engines.config.detector import Config, parse_range
from engines.runtime.machine import GPU_RESERVE, Machine, format_duration
from engines.runtime.precision import resolve_precision
from engines.runtime.profiler import StepProfile
from engines.runtime.run_folder import check_run_folder
from engines.train.batch_plan import BatchPlan, plan_batches
from engines.train.build import build_model
from engines.train.detector_memory import DetectorMemory, estimate_detector_memory
from engines.train.open_data import draws_shards, open_sets
from engines.train.pass_size import MOST_IMAGES, fitting_micro_batches
from engines.train.resume import as_begun, check_same_run, find_state
from engines.train.selection import check_validation_exists
from models.detector.weights import fetch_command, find_weights

MEASURED_RATES = {("resnet50", 224): 4418.0}
"""Images/s of a GPU from tars through DALI, by backbone and side: one H200, docs/performance.md."""


def plan_training(config: Config, machine: Machine, rate: float | None = None) -> str:
    """The batch of each process, steps, memory, reads and time of a run, and what its checks say.

    Args:
        rate: images/s of a process; None takes a measured one, where there is one.

    Raises:
        UserError: what the run would raise before its first step.
    """
    folder, world = Path(config.run.dir), machine.first_process
    check_run_folder(folder)
    if draws_shards(config):
        return _without_shards(config, machine, rate)
    train_set, val_set = open_sets(config, cached=False)
    audit = audit_line(config.data.shards, required=config.data.require_audit)
    store = CheckpointFolder(folder / "checkpoints", config.checkpoint.keep)
    state = find_state(config, world, store, prepare=False)
    if state is not None:
        check_same_run(config, world, state, train_set)
        config = as_begun(config, state)
    precision = resolve_precision(config.train.precision, world.device)
    plan = plan_batches(config, machine.processes, train_images=len(train_set))
    check_validation_exists(config, train_set, val_set)
    order = TrainingOrder(train_set, config.data, config.run.seed, config.train.global_batch)
    held = held_bytes(config.data, train_set, val_set) if config.data.resident else 0
    weights, given = _weights(config)
    model, report = build_model(
        replace(config, model=replace(config.model, weights=given)), train_set, torch.device("cpu")
    )
    assert plan.steps is not None
    StepProfile(parse_range(config.train.profile), plan.steps, folder, world)
    memory = estimate_detector_memory(model, config, precision)
    steps = plan.steps
    plan = _fitted(config, machine, plan, memory, held, len(train_set))
    lines = [
        f"{folder}: {config.model.backbone} on {machine}, {precision}",
        f"data: {len(train_set)} training and {len(val_set) if val_set else 0} validation images "
        f"({config.data.shards}); the last {order.dropped} of each epoch are dropped",
        *_batch_lines(config, machine, plan),
        f"steps: {steps}, {order.steps_per_epoch} in an epoch",
        f"learning rate: {plan.learning_rate:g} at its peak",
        _memory_line(machine, plan, memory, held),
        *_read_lines(config, machine, order, train_set),
        _time_line(config, plan, machine, rate, steps - (0 if state is None else state["step"])),
        audit,
        f"weights: {weights}" + (f"; {report}" if report else ""),
        _resume_line(state, steps, folder),
        "all checks before the first step passed; the run's folder is as it was",
    ]
    return "\n".join(lines)


def _without_shards(config: Config, machine: Machine, rate: float | None) -> str:
    """The plan where the data would be drawn first, so that nothing is known of it but its number."""
    plan = plan_batches(config, machine.processes)
    steps = [] if plan.steps is None else [f"steps: {plan.steps}"]
    timed = [] if plan.steps is None else [_time_line(config, plan, machine, rate, plan.steps)]
    synthetic = config.data.synthetic
    return "\n".join(
        [
            f"{config.run.dir}: {config.model.backbone} on {machine}",
            f"data: {synthetic.images} synthetic images of {synthetic.size} px will be drawn into "
            f"{config.data.shards}; the rest follows from them",
            *_batch_lines(config, machine, plan),
            *steps,
            f"learning rate: {plan.learning_rate:g} at its peak",
            *timed,
            f"weights: {_weights(config)[0]}",
            "all checks that need no data passed; the run's folder is as it was",
        ]
    )


def _weights(config: Config) -> tuple[str, str]:
    """(where they come from, what of `model.weights` can be loaded on this machine)."""
    source, backbone = config.model.weights, config.model.backbone
    if not source:
        return "random", ""
    with as_user_error():
        if find_weights(source, backbone) is not None:
            return source, source
        command = fetch_command(source, backbone)
    return f"{source} is not on this machine and will be downloaded; without a network, first: {command}", ""


def _fitted(
    config: Config, machine: Machine, plan: BatchPlan, memory: DetectorMemory, held: int, images: int
) -> BatchPlan:
    """The plan with passes that a GPU of the machine's memory holds."""
    if machine.gpu_memory is None:
        return plan
    unit = config.train.micro_batch * memory.image
    free = int(0.8 * (machine.gpu_memory - GPU_RESERVE - held - memory.state))
    most = fitting_micro_batches(unit, 2 * unit, free, max(1, MOST_IMAGES // config.train.micro_batch))
    most_images = most * config.train.micro_batch
    return plan_batches(config, machine.processes, most_images=most_images, train_images=images)


def _batch_lines(config: Config, machine: Machine, plan: BatchPlan) -> list[str]:
    total, most, least = sum(plan.micro_batches), max(plan.micro_batches), min(plan.micro_batches)
    shares = f"{most}" if most == least else f"{least} to {most}"
    # On a CPU a pass holds one micro-batch unless `train.pass_images` says more.
    alone = not machine.on_gpu and config.train.pass_images == "auto"
    passes, images = (most, plan.micro_batch) if alone else (plan.passes, plan.pass_images)
    lines = [
        f"batch: {plan.global_batch} images a step are {total} ghost batches of {plan.micro_batch}; each of "
        f"{machine.processes} processes has {shares}, in {passes} pass{'es' if passes > 1 else ''} of at most "
        f"{images} images"
    ]
    if most > least:
        busy = total / (most * machine.processes)
        lines.append(
            f"       processes with fewer wait for the others: {busy:.0%} of their time is used, all of it where "
            f"the number of processes divides {total}"
        )
    return lines


def _memory_line(machine: Machine, plan: BatchPlan, memory: DetectorMemory, held: int) -> str:
    if not machine.on_gpu:
        return f"memory: {_gib(memory.state)} of weights and optimizer in each process, {_gib(held)} of images held"
    needed = memory.of_pass(plan.pass_images) + held + GPU_RESERVE
    of = "" if machine.gpu_memory is None else f" of {_gib(machine.gpu_memory)}"
    return (
        f"memory: about {_gib(needed)}{of} on each GPU, estimated: {_gib(memory.state)} of weights and optimizer, "
        f"{_gib(plan.pass_images * memory.image)} of activations ({memory.image / 2**20:.0f} MiB an image), "
        f"{_gib(GPU_RESERVE)} of CUDA" + (f", {_gib(held)} of images held" if held else "")
    )


def _read_lines(config: Config, machine: Machine, order: TrainingOrder, train_set: ShardSet) -> list[str]:
    """What each node reads in the first epoch; those after it differ in which shards."""
    unit, world = config.train.micro_batch, machine.processes
    total = config.train.global_batch // unit
    sizes, counts = (shard_counts(train_set.shards, name) for name in ("bytes", "samples"))
    mean = float(sizes.sum()) / max(1, int(counts.sum()))
    cached = bool(config.data.cache_dir) or is_url(config.data.shards)
    found = []
    for node in range(machine.nodes):
        first = micro_batches_of(total, node * machine.per_node, world)
        last = micro_batches_of(total, (node + 1) * machine.per_node - 1, world)
        start, stop = first.start * unit, last.stop * unit
        shards = order.shards_of(start, stop)
        images = (stop - start) * order.steps_per_epoch
        copied = f", {_gib(float(sizes[shards].sum()))} copied to the cache" if cached else ""
        found.append(
            f"{images} images of {len(shards)} of {len(sizes)} shards in an epoch, {_gib(images * mean)}{copied}"
        )
    if config.data.resident:
        return [f"reads: every process decodes all {len(train_set)} images once, {_gib(float(sizes.sum()))}"]
    if len(set(found)) == 1:
        return [f"reads: each node {found[0]}" if machine.nodes > 1 else f"reads: {found[0]}"]
    return [f"reads: node {node} {text}" for node, text in enumerate(found)]


def _time_line(config: Config, plan: BatchPlan, machine: Machine, rate: float | None, steps: int) -> str:
    source = "given"
    if rate is None and machine.on_gpu:
        rate = MEASURED_RATES.get((config.model.backbone, config.data.size))
        source = "measured on one H200, docs/performance.md"
    if rate is None:
        return "time: unknown; give --rate, images/s of a process"
    seconds = steps * max(plan.micro_batches) * plan.micro_batch / rate
    return (
        f"time: {format_duration(seconds)} for {steps} steps at {rate:,g} images/s of a process ({source}), without "
        "start, validation and communication"
    )


def _resume_line(state: dict[str, Any] | None, steps: int, folder: Path) -> str:
    if state is None:
        return "resume: no checkpoint, the run begins"
    if state["step"] >= steps and (folder / "final.safetensors").is_file():
        return f"resume: already finished at step {state['step']}"
    return f"resume: continues after step {state['step']} of {steps}"


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.1f} MiB"
