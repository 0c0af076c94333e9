"""Estimate the GPU memory and the FLOPs of a finetuning run, before anything is loaded.

Model states follow Rajbhandari et al., "ZeRO: Memory optimizations toward training trillion
parameter models" (2020), section 3.1: 2 bytes of weights and 2 of gradients for each
parameter, 12 of fp32 master and Adam's averages; the stage decides what is partitioned.
DeepSpeed's own `estimate_zero{2,3}_model_states_mem_needs` count 4 bytes of fp32 gradients more
for each parameter, and assume that every parameter learns.
Activations follow Korthikanti et al., "Reducing activation recomputation in large transformer
models" (2022), equation 2 without the attention matrix, which sdpa does not keep.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import LlavaConfig

from dataio.core.errors import UserError
from engines.config.mlm import FinetuneConfig, TuneConfig
from engines.mlm import deepspeed_config as zero
from engines.runtime.distributed import World
from engines.runtime.machine import GPU_RESERVE
from engines.stats.text_table import text_table
from models.tinyllava.model import IMAGE_TOKEN_ID, PHI2, SIGLIP, count_parameters, image_tokens, make_config

GIB = 2**30
_BUCKET = 5e8  # elements of DeepSpeed's reduce and gather buckets
_FOUR_BITS = 0.5 + 0.064  # bytes of a 4-bit weight with its doubly quantized scales


@dataclasses.dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on each GPU."""

    weights: float
    gradients: float
    optimizer: float
    buffers: float
    activations: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.buffers + self.activations


def lora_parameters(config: LlavaConfig, rank: int) -> int:
    """Parameters of adapters on every linear layer of the language model except the output."""
    text = config.text_config
    hidden, inner = text.hidden_size, text.intermediate_size
    # q, k, v, dense, then fc1 and fc2: rank * (inputs + outputs) each.
    return text.num_hidden_layers * rank * (4 * 2 * hidden + 2 * (hidden + inner))


def learned_parameters(config: LlavaConfig, tune: TuneConfig) -> dict[str, int]:
    """Number of parameters that learn, by part."""
    counts = count_parameters(config)
    layers = config.vision_config.num_hidden_layers
    used = {"frozen": 0, "full": layers - 1, "partial": max(0, layers - 1 - tune.vision_from_layer)}
    language = {"full": counts["language"], "frozen": 0}.get(
        tune.language, lora_parameters(config, tune.lora_rank) if tune.adapters else 0
    )
    return {
        "language": language,
        "connector": counts["connector"] if tune.connector else 0,
        "vision": counts["vision"] * used[tune.vision] // layers,
    }


def estimate_memory(
    model: LlavaConfig,
    config: FinetuneConfig,
    settings: Mapping[str, Any],
    *,
    length: int,
    world: int,
    precision: str,
) -> MemoryEstimate:
    """Bytes on each of `world` GPUs.

    Args:
        settings: DeepSpeed's. length: tokens of the longest conversation, with the image's.
    """
    stage, tune = zero.stage_of(settings), config.tune
    counts, learned = count_parameters(model), sum(learned_parameters(model, config.tune).values())
    width = 4 if precision == "fp32" else 2
    frozen_language = counts["language"] * (_FOUR_BITS if tune.language == "qlora" else width)
    added = lora_parameters(model, tune.lora_rank) * width if tune.adapters else 0
    weights: float = frozen_language + added + (counts["connector"] + counts["vision"]) * width
    gradients, optimizer = float(learned * width), learned * 12.0
    buffers = 2 * min(_BUCKET, learned) * width
    if stage == 3:
        weights, gradients, optimizer = weights / world, gradients / world, optimizer / world
    elif stage == 2:
        gradients, optimizer = gradients / world, optimizer / world
    else:
        optimizer /= world
    if zero.offloads(settings):
        optimizer, gradients = 0.0, gradients / 2
    if zero.offloads(settings, "offload_param"):
        weights = 2 * _layer_parameters(model) * width
    return MemoryEstimate(weights, gradients, optimizer, buffers, _activations(model, config, length, width))


def _layer_parameters(model: LlavaConfig) -> int:
    hidden, inner = model.text_config.hidden_size, model.text_config.intermediate_size
    return 4 * hidden * hidden + 2 * hidden * inner


def _activations(model: LlavaConfig, config: FinetuneConfig, length: int, width: int) -> float:
    text, vision, batch = model.text_config, model.vision_config, config.train.micro_batch
    scale = width / 2  # the paper's 34 bytes are of 2-byte numbers
    live = 34 * length * text.hidden_size * batch * scale
    kept = 2 * length * text.hidden_size * batch * scale
    language = (
        live + text.num_hidden_layers * kept
        if config.train.gradient_checkpointing
        else (text.num_hidden_layers * live)
    )
    patches = image_tokens(model) + 1
    of_tower = 34 * patches * vision.hidden_size * batch * scale
    if config.tune.vision == "frozen":
        tower = of_tower
    elif config.train.gradient_checkpointing:
        tower = of_tower + vision.num_hidden_layers * of_tower / 17
    else:
        tower = vision.num_hidden_layers * of_tower
    # Logits in the model's dtype, in fp32 for the loss, and their gradient.
    logits = length * text.vocab_size * batch * (width + 4 + 4)
    return language + tower + logits


def flops_per_token(model: LlavaConfig, tune: TuneConfig) -> float:
    """Model FLOPs of a token's forward and backward pass: 2 and 4 per parameter that it passes.

    The convention of Chowdhery et al., "PaLM" (2022), appendix B, without the products inside
    attention. Frozen weights need no gradient of their own (2 instead of 4 in the backward
    pass); recomputation does not count. The tower's work is divided among the image's tokens.
    """
    counts, learned = count_parameters(model), learned_parameters(model, tune)
    embedding = model.text_config.vocab_size * model.text_config.hidden_size
    language = counts["language"] - embedding
    passes = 6 if tune.language == "full" else 4
    tower = 6 if tune.vision != "frozen" else 2
    patches = image_tokens(model) + 1
    per_image = counts["vision"] * patches * tower / image_tokens(model)
    return (
        language * passes
        + counts["connector"] * 6
        + learned["language"] * (2 if tune.adapters else 0)
        + per_image
    )


def check_memory(
    config: FinetuneConfig,
    model: LlavaConfig,
    settings: Mapping[str, Any],
    world: World,
    precision: str,
    length: int,
    available: float | None = None,
) -> None:
    """Check that a run fits on the GPU.

    Args:
        settings: DeepSpeed's. length: tokens of the longest conversation.
        available: bytes; None queries the GPU, and checks nothing on a CPU.

    Raises:
        UserError: the GPU is too small; names settings that would fit.
    """
    if not config.train.memory_check:
        return
    if available is None:
        if world.device.type != "cuda":
            return
        available = float(torch.cuda.mem_get_info(world.device)[0])
    needed = estimate_memory(model, config, settings, length=length, world=world.size, precision=precision)
    if needed.total + GPU_RESERVE <= available:
        return
    fits = [
        name
        for name, other, zeroed in _alternatives(config, settings)
        if estimate_memory(model, other, zeroed, length=length, world=world.size, precision=precision).total
        + GPU_RESERVE
        <= available
    ]
    advice = f"these would fit: {'; '.join(fits[:3])}" if fits else "no setting fits; use more or larger GPUs"
    raise UserError(
        f"about {_gib(needed.total + GPU_RESERVE)} of memory are needed on each GPU (weights {_gib(needed.weights)}, "
        f"gradients {_gib(needed.gradients)}, optimizer {_gib(needed.optimizer)}, buffers {_gib(needed.buffers)}, "
        f"activations {_gib(needed.activations)} at {length} tokens), {_gib(available)} are free: {advice} "
        "(train.memory_check false starts anyway)"
    )


def _gib(value: float) -> str:
    return f"{value / GIB:.1f} GiB"


def _alternatives(
    config: FinetuneConfig, settings: Mapping[str, Any]
) -> list[tuple[str, FinetuneConfig, Mapping[str, Any]]]:
    """Settings that need less memory, the smallest change first."""
    train = dataclasses.replace(config.train, gradient_checkpointing=True)
    frugal = dataclasses.replace(config, train=train)
    single = dataclasses.replace(frugal, train=dataclasses.replace(train, micro_batch=1))
    lora = dataclasses.replace(single, tune=dataclasses.replace(config.tune, language="lora"))
    three: dict[str, Any] = {"zero_optimization": {"stage": 3}}
    offload: dict[str, Any] = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    both: dict[str, Any] = {
        "zero_optimization": {
            "stage": 3,
            "offload_optimizer": {"device": "cpu"},
            "offload_param": {"device": "cpu"},
        }
    }
    ways: list[tuple[str, FinetuneConfig, Mapping[str, Any]]] = [
        ("train.gradient_checkpointing true", frugal, settings),
        ("train.micro_batch 1", single, settings),
        ("train.micro_batch 1, deepspeed configs/deepspeed/zero3.json", single, three),
        ("train.micro_batch 1, deepspeed configs/deepspeed/zero2_offload.json", single, offload),
        ("train.micro_batch 1, tune.language lora", lora, settings),
        ("train.micro_batch 1, deepspeed configs/deepspeed/zero3_offload.json", single, both),
    ]
    if config.tune.language == "lora":
        quantized = dataclasses.replace(single, tune=dataclasses.replace(config.tune, language="qlora"))
        ways.append(("train.micro_batch 1, tune.language qlora", quantized, settings))
    return ways


def finetuning_memory_table(config: FinetuneConfig, gpus: Sequence[int], length: int) -> str:
    """GiB on each GPU for the published model, a row for each of configs/deepspeed/.

    Args:
        config: of the run; its own `deepspeed` file is ignored. gpus: numbers of GPUs.
        length: tokens of the longest conversation, with the image's.
    """
    model = make_config(PHI2, SIGLIP, image_token_id=IMAGE_TOKEN_ID)
    learned = sum(learned_parameters(model, config.tune).values())
    precision = "bf16" if config.model.precision == "auto" else config.model.precision
    title = (
        f"language {config.tune.language}, vision {config.tune.vision}: {learned:,} parameters learn; "
        f"{precision}, micro-batch {config.train.micro_batch}, {length} tokens; GiB on each GPU (states alone)"
    )
    rows = []
    for name in ("zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"):
        settings = zero.read_deepspeed(f"configs/deepspeed/{name}.json")
        cells = []
        for world in gpus:
            need = estimate_memory(model, config, settings, length=length, world=world, precision=precision)
            states = need.weights + need.gradients + need.optimizer
            cells.append(f"{(need.total + GPU_RESERVE) / GIB:.1f} ({states / GIB:.1f})")
        rows.append([name, *cells])
    headers = ["", *(f"{count} GPU{'s' * (count > 1)}" for count in gpus)]
    return f"{title}\n{text_table(rows, headers, align='l' + 'r' * len(gpus))}"
