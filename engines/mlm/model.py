"""The model of a finetuning run: loading, freezing, adapters, parameter groups."""

from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlavaConfig

from dataio.core.errors import UserError, one_line
from engines.config.mlm import FinetuneConfig, MlmOptimConfig, TuneConfig
from engines.runtime.precision import resolve_precision
from models.tinyllava.checkpoint import load_tinyllava
from models.tinyllava.model import part_of

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Every linear layer of Phi-2 except the output, as in the reference's recipe: 192 in the published model.
LORA_TARGETS = r".*language_model\..*\.(q_proj|k_proj|v_proj|dense|fc1|fc2)"


def resolve_mlm_precision(precision: str, device: torch.device) -> str:
    """fp32, bf16 or fp16; "auto" is bf16 on a GPU and fp32 on a CPU.

    Raises:
        UserError: fp16 on a CPU, which DeepSpeed does not support.
    """
    if precision == "fp16" and device.type == "cpu":
        raise UserError(
            "model.precision is fp16, which DeepSpeed supports only on GPUs; use bf16, fp32 or auto"
        )
    return resolve_precision(precision, device)


def load_model_to_tune(config: FinetuneConfig, precision: str, device: torch.device) -> nn.Module:
    """The model to train, with parts frozen and adapters added as `config.tune` says.

    Raises:
        UserError: the weights cannot be read, or qlora without a GPU.
    """
    options: dict[str, Any] = {"attn_implementation": config.model.attention}
    check_four_bits(config.tune, device)
    if config.tune.language == "qlora":
        options["quantization_config"] = _four_bits(TORCH_DTYPES[precision])
        options["device_map"] = {"": device}
    try:
        # Adapters and frozen parts stay in the run's precision; DeepSpeed keeps fp32 masters.
        model, _ = load_tinyllava(
            config.model.weights, dtype=TORCH_DTYPES[precision], seed=config.run.seed, **options
        )
    except (ValueError, ImportError) as error:
        raise UserError(f"model.weights {one_line(error)}") from None
    if config.model.dropout >= 0:
        set_dropout(model, config.model.dropout)
    model.config.use_cache = False
    # Adapters start at random, and loading a folder of weights seeds nothing.
    torch.manual_seed(config.run.seed)
    return apply_tuning(model, config.tune)


def check_four_bits(config: TuneConfig, device: torch.device) -> None:
    """Check that 4-bit weights, where they are asked for, have a GPU.

    Raises:
        UserError: qlora on a CPU.
    """
    if config.language == "qlora" and device.type != "cuda":
        raise UserError("tune.language is qlora, whose 4-bit kernels need a GPU; use lora")


def _four_bits(dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["lm_head", "vision_tower", "multi_modal_projector"],
    )


def set_dropout(model: Any, share: float) -> None:
    """Set Phi-2's residual dropout, in the configuration and in the existing layers."""
    model.config.text_config.resid_pdrop = share
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and name.endswith("resid_dropout"):
            module.p = share


def check_vision_layers(config: TuneConfig, shape: LlavaConfig) -> None:
    """Check that a partly trained vision tower has a layer that learns.

    Raises:
        UserError: `vision_from_layer` is behind the last layer of the tower that is used.
    """
    layers = shape.vision_config.num_hidden_layers
    if config.vision == "partial" and config.vision_from_layer >= layers - 1:
        raise UserError(
            f"tune.vision_from_layer is {config.vision_from_layer}, but features are the output of layer "
            f"{layers - 2} of this tower; use {layers - 2} or less"
        )


def apply_tuning(model: Any, config: TuneConfig) -> Any:
    """Freeze the parts that do not learn; add adapters to the language model if configured.

    Raises:
        UserError: `vision_from_layer` is behind the last layer of the tower that is used.
    """
    check_vision_layers(config, model.config)
    layers = model.config.vision_config.num_hidden_layers
    model.requires_grad_(False)
    # Features are the tower's second-last hidden state: its last layer and norm get no gradient.
    used = range(config.vision_from_layer if config.vision == "partial" else 0, layers - 1)
    tower = [f"vision_tower.encoder.layers.{layer}" for layer in used] if config.vision != "frozen" else []
    if config.vision == "full":
        tower.append("vision_tower.embeddings")
    modules = [*(["multi_modal_projector"] if config.connector else []), *tower]
    if config.adapters:
        lora = LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            bias="none",
            target_modules=LORA_TARGETS,
            use_dora=config.language == "dora",
        )
        # In the model's dtype: ZeRO-3 flattens all parameters into one buffer, and keeps fp32 copies.
        wrapped = get_peft_model(model, lora, autocast_adapter_dtype=False)
        _unfreeze(wrapped, modules)
        return wrapped
    if config.language == "full":
        for name, parameter in model.named_parameters():
            if part_of(name) == "language":
                parameter.requires_grad_(True)
    _unfreeze(model, modules)
    return model


def _unfreeze(model: nn.Module, modules: list[str]) -> None:
    for name, parameter in model.named_parameters():
        if any(f".{module}." in f".{name}" for module in modules):
            parameter.requires_grad_(True)


def merge_adapters(model: Any) -> Any:
    """Merge adapters into the weights; a model without adapters is returned unchanged."""
    return model.merge_and_unload() if isinstance(model, PeftModel) else model


def mlm_parameter_groups(model: nn.Module, config: MlmOptimConfig) -> list[dict[str, Any]]:
    """Parameter groups for AdamW: a learning rate for each part, no weight decay of norms and biases."""
    rates = {
        "language": config.lr,
        "connector": config.connector_lr or config.lr,
        "vision": config.vision_lr or config.lr,
    }
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # Under ZeRO-3 the parameter is empty; `ds_shape` has its shape.
            shape = getattr(parameter, "ds_shape", parameter.shape)
            groups.setdefault((part_of(name), len(shape) > 1), []).append(parameter)
    return [
        {"params": members, "lr": rates[part], "weight_decay": config.weight_decay if decayed else 0.0}
        for (part, decayed), members in sorted(groups.items(), key=lambda item: item[0])
    ]
