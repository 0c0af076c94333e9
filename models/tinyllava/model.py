"""TinyLLaVA (SigLIP + Phi-2) as Hugging Face's LLaVA with the two things it lacks.

Phi-2's output layer has a bias, and a batch of text alone must run through the same modules
as one with images, or ZeRO's collectives do not meet. Everything else (attention, generate,
gradient checkpointing, names) is Hugging Face's.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import LlavaConfig, PhiConfig, SiglipVisionConfig
from transformers.integrations import deepspeed as integration
from transformers.models.llava.modeling_llava import (
    LlavaForConditionalGeneration,
    LlavaModel,
    LlavaPreTrainedModel,
)

IMAGE_TOKEN_ID = 50295  # the first id behind Phi-2's tokenizer; its embedding row exists and is unused
TINY_IMAGE_SIZE = 56

# What TinyLLaVA-Phi-2-SigLIP-3.1B has; the published config leaves some of it to defaults.
PHI2: dict[str, Any] = {
    "vocab_size": 51200,
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "gelu_new",
    "partial_rotary_factor": 0.4,
    "layer_norm_eps": 1e-5,
    "resid_pdrop": 0.1,
    "embd_pdrop": 0.0,
    "max_position_embeddings": 2048,
    "bos_token_id": 50256,
    "eos_token_id": 50256,
    "pad_token_id": 50256,
    "tie_word_embeddings": False,
}
SIGLIP: dict[str, Any] = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
    "layer_norm_eps": 1e-6,
    "hidden_act": "gelu_pytorch_tanh",
}


class TinyLlavaModel(LlavaModel):
    """LLaVA's body, for which a batch without image tokens is legal.

    Such a batch still carries one image (the collator's zeros), whose features go nowhere:
    so every rank runs the tower and the connector, which gets zero gradients, not none.
    """

    def get_placeholder_mask(
        self, input_ids: torch.Tensor, inputs_embeds: torch.Tensor, image_features: torch.Tensor
    ) -> torch.Tensor:
        """Where image features go: bool [N, T, 1]; all false in a batch of text alone."""
        if input_ids is not None and not (input_ids == self.config.image_token_id).any():
            return torch.zeros(*input_ids.shape, 1, dtype=torch.bool, device=inputs_embeds.device)
        return super().get_placeholder_mask(input_ids, inputs_embeds, image_features)


class TinyLlavaForConditionalGeneration(LlavaForConditionalGeneration):
    """Hugging Face's LLaVA with `TinyLlavaModel` and an output layer with a bias."""

    def __init__(self, config: LlavaConfig) -> None:
        # Not LLaVA's own __init__, which would build (and under ZeRO-3 partition) a second body.
        LlavaPreTrainedModel.__init__(self, config)
        self.model = TinyLlavaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=True)
        self.post_init()


def image_tokens(config: LlavaConfig) -> int:
    """Image tokens per image: the patches less the first (728 at 384 px), which TinyLLaVA drops.

    Its code removes a CLS token that SigLIP does not have; the published weights were
    trained so.
    """
    side = config.vision_config.image_size // config.vision_config.patch_size
    return side * side - 1


def make_config(text: dict[str, Any], vision: dict[str, Any], *, image_token_id: int) -> LlavaConfig:
    """LLaVA's configuration of a Phi text model and a SigLIP tower.

    Args:
        text, vision: keys of PhiConfig and SiglipVisionConfig.
        image_token_id: of `<image>` in the tokenizer.
    """
    text_config = PhiConfig(**text)
    # Without its attention-pooling head, which nothing uses and ZeRO-3 trips over.
    vision_config = SiglipVisionConfig(**vision, vision_use_head=False)
    config = LlavaConfig(
        text_config=text_config,
        vision_config=vision_config,
        image_token_index=image_token_id,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        multimodal_projector_bias=True,
        tie_word_embeddings=False,
    )
    config.image_seq_length = image_tokens(config)
    config.lm_head_bias = True  # for readers: the stock LLaVA class would drop it without an error
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, key, getattr(text_config, key))
    return config


def tiny_config(vocab_size: int, image_token_id: int, end_id: int) -> LlavaConfig:
    """A model of the same kind, small enough for a CPU: 15 image tokens of 56 px."""
    text = {
        **PHI2,
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "bos_token_id": end_id,
        "eos_token_id": end_id,
        "pad_token_id": end_id,
    }
    vision = {
        **SIGLIP,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": TINY_IMAGE_SIZE,
    }
    return make_config(text, vision, image_token_id=image_token_id)


@contextmanager
def without_zero3_init() -> Iterator[None]:
    """Models made inside are whole, also where a run under ZeRO-3 partitions those it makes."""
    held = integration._hf_deepspeed_config_weak_ref
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        integration._hf_deepspeed_config_weak_ref = held


def meta_model(config: LlavaConfig) -> TinyLlavaForConditionalGeneration:
    """The model without its numbers: names and shapes."""
    with without_zero3_init(), torch.device("meta"):
        return TinyLlavaForConditionalGeneration(config)


def count_parameters(config: LlavaConfig) -> dict[str, int]:
    """Parameters of each part, by name (vision, connector, language), without making them."""
    counts = {"vision": 0, "connector": 0, "language": 0}
    for name, parameter in meta_model(config).named_parameters():
        counts[part_of(name)] += parameter.numel()
    return counts


def part_of(name: str) -> str:
    """Which part a parameter belongs to: vision, connector or language."""
    if "vision_tower." in name:
        return "vision"
    return "connector" if "multi_modal_projector." in name else "language"
