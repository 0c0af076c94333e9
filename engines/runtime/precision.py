"""The number format of activations."""

import torch

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""What torch.autocast computes in; fp32 needs no autocast."""


def resolve_precision(precision: str, device: torch.device) -> str:
    """fp32, bf16 or fp16: `precision` itself, or for "auto" bf16 on a GPU and fp32 on a CPU."""
    if precision != "auto":
        return precision
    return "bf16" if device.type == "cuda" else "fp32"
