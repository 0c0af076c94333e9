"""TinyLLaVA (SigLIP + Phi-2) as Hugging Face's LLaVA with two additions.

Phi-2's output layer has a bias. And a batch of text alone must run through the same modules as
a batch with images: otherwise the ranks call different collectives under ZeRO and hang.
Everything else (attention, generate, gradient checkpointing, names) is Hugging Face's.
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

IMAGE_TOKEN_ID = 50295  # the first id after Phi-2's tokenizer; its embedding row exists and is unused
TINY_IMAGE_SIZE = 56

# TinyLLaVA-Phi-2-SigLIP-3.1B; the published config leaves some of these values to defaults.
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
    """LLaVA's body, which also accepts a batch without image tokens.

    Such a batch still has one image (the collator's zeros), whose features are not used: every
    rank runs the tower and the connector, and the connector gets zero gradients instead of none.
    """

    def get_placeholder_mask(
        self, input_ids: torch.Tensor, inputs_embeds: torch.Tensor, image_features: torch.Tensor
    ) -> torch.Tensor:
        """Positions of the image features: bool [N, T, 1]; all false in a batch of text alone."""
        if input_ids is not None and not (input_ids == self.config.image_token_id).any():
            return torch.zeros(*input_ids.shape, 1, dtype=torch.bool, device=inputs_embeds.device)
        return super().get_placeholder_mask(input_ids, inputs_embeds, image_features)


class TinyLlavaForConditionalGeneration(LlavaForConditionalGeneration):
    """Hugging Face's LLaVA with `TinyLlavaModel` and an output layer with a bias."""

    def __init__(self, config: LlavaConfig) -> None:
        # Skip LLaVA's own __init__, which would build (and under ZeRO-3 partition) a second body.
        LlavaPreTrainedModel.__init__(self, config)
        self.model = TinyLlavaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=True)
        self.post_init()


def image_tokens(config: LlavaConfig) -> int:
    """Tokens per image: the patches without the first one (728 at 384 px).

    TinyLLaVA's code drops the first feature as if it were a CLS token, which SigLIP does not
    have; the published weights were trained that way.
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
    # Without the attention-pooling head: it is unused, and ZeRO-3 fails on it.
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
    config.lm_head_bias = True  # a note in config.json: the stock LLaVA class drops the bias without an error
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, key, getattr(text_config, key))
    return config


def tiny_config(vocab_size: int, image_token_id: int, end_id: int) -> LlavaConfig:
    """A model of the same architecture, small enough for a CPU: 56 px, 15 tokens per image."""
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
    """Build or load whole models in this context, even while a ZeRO-3 run partitions new models."""
    active = integration._hf_deepspeed_config_weak_ref
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        integration._hf_deepspeed_config_weak_ref = active


def meta_model(config: LlavaConfig) -> TinyLlavaForConditionalGeneration:
    """The model on the meta device: names and shapes without data."""
    with without_zero3_init(), torch.device("meta"):
        return TinyLlavaForConditionalGeneration(config)


def count_parameters(config: LlavaConfig) -> dict[str, int]:
    """Number of parameters of each part (vision, connector, language), without allocating them."""
    counts = {"vision": 0, "connector": 0, "language": 0}
    for name, parameter in meta_model(config).named_parameters():
        counts[part_of(name)] += parameter.numel()
    return counts


def part_of(name: str) -> str:
    """Which part a parameter belongs to: vision, connector or language."""
    if "vision_tower." in name:
        return "vision"
    return "connector" if "multi_modal_projector." in name else "language"
