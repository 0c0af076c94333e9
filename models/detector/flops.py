"""How much arithmetic an image costs, and how much a GPU could do: what MFU divides."""

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from models.detector.dual_head import DualHead

# Dense peaks in FLOP/s, without sparsity, from NVIDIA's data sheets of the named products.
# fp16 and bf16 run on tensor cores; fp32 is the plain one (TF32 is off by default).
_PEAKS = {
    "B200": {"half": 2250e12, "fp32": 75e12},
    "H200": {"half": 989.5e12, "fp32": 67e12},
    "H100 PCIe": {"half": 756e12, "fp32": 51e12},
    "H100": {"half": 989.5e12, "fp32": 67e12},
    "A100": {"half": 312e12, "fp32": 19.5e12},
    "A10": {"half": 125e12, "fp32": 31.2e12},
    "L40S": {"half": 362e12, "fp32": 91.6e12},
    "L4": {"half": 121e12, "fp32": 30.3e12},
    "V100": {"half": 125e12, "fp32": 15.7e12},
    "T4": {"half": 65e12, "fp32": 8.1e12},
    "RTX 4090": {"half": 165.2e12, "fp32": 82.6e12},
    "RTX 3090": {"half": 71e12, "fp32": 35.6e12},
}


def training_flops(model: DualHead, size: int) -> int:
    """FLOPs of one image's forward and backward pass (a multiply-add counts as two).

    Counted, not estimated: convolutions and matrix products as torch.utils.flop_counter
    sees them, without the gradient of the pixels, which nobody needs. Parameters that are
    frozen cost no gradient.

    Args:
        model: on any device; not changed. size: side of the image, pixels.
    """
    modes = [(module, module.training) for module in model.modules()]
    device = next(model.parameters()).device
    gradients: list[Any] = [p.grad for p in model.parameters()]
    try:
        with FlopCounterMode(display=False) as counter, torch.random.fork_rng():
            # In evaluation mode: batch norm would count this image in its statistics.
            generator_logits, object_logits = model.eval()(torch.zeros(1, 3, size, size, device=device))
            (generator_logits.sum() + object_logits.sum()).backward()
    finally:
        for module, training in modes:
            module.training = training
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient
    return int(counter.get_total_flops())


def peak_flops(device_name: str, precision: str) -> float | None:
    """FLOP/s that the named GPU could do at best in "fp32", "bf16" or "fp16"; None if unknown.

    Args:
        device_name: as torch.cuda.get_device_name gives it, "NVIDIA H100 80GB HBM3".
    """
    if precision == "bf16" and any(old in device_name for old in ("V100", "T4")):
        return None  # they emulate it
    for name, peaks in _PEAKS.items():
        words = name.split()
        if all(word in device_name.replace("-", " ").split() for word in words):
            return peaks["fp32" if precision == "fp32" else "half"]
    return None
