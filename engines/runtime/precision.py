"""The number formats of activations and of products."""

import torch

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""What torch.autocast computes in; fp32 needs no autocast."""


def resolve_precision(precision: str, device: torch.device) -> str:
    """fp32, bf16 or fp16: `precision` itself, or for "auto" bf16 on a GPU and fp32 on a CPU."""
    if precision != "auto":
        return precision
    return "bf16" if device.type == "cuda" else "fp32"


def set_tf32(enabled: bool) -> None:
    """Let a GPU's fp32 products and convolutions round their factors to TensorFloat-32, or not.

    It holds for the whole process. Each is set by its own name: the defaults differ (cuDNN rounds,
    cuBLAS does not), and the name above them does not reach both in every version.
    """
    precision = "tf32" if enabled else "ieee"
    torch.backends.cuda.matmul.fp32_precision = precision
    torch.backends.cudnn.conv.fp32_precision = precision  # type: ignore[attr-defined]
    torch.backends.cudnn.rnn.fp32_precision = precision  # type: ignore[attr-defined]
