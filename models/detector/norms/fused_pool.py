"""ResNet's max pooling by the kernels of `pool_kernels`; `import` fails without Triton."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.detector.norms import pool_kernels as kernels

_LAUNCH = {"num_warps": 4, "enable_fp_fusion": True}


def _cols(channels: int) -> int:
    return min(128, max(16, 1 << (channels - 1).bit_length()))


class _FusedPool(torch.autograd.Function):
    """Max pooling 3x3, stride 2, padding 1, of a channels_last map."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        images, channels, height, width = x.shape
        out_height, out_width = (height + 1) // 2, (width + 1) // 2
        shape = (images, channels, out_height, out_width)
        y, winner = (
            torch.empty(shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)
            for dtype in (x.dtype, torch.uint8)
        )
        outputs, cols = images * out_height * out_width, _cols(channels)
        rows = 2048 // cols
        with torch.cuda.device_of(x):
            kernels.pooled_map[(-(-outputs // rows) * -(-channels // cols),)](
                x,
                y,
                winner,
                outputs,
                height,
                width,
                out_height,
                out_width,
                channels,
                ROWS=rows,
                COLS=cols,
                **_LAUNCH,
            )
        ctx.save_for_backward(winner)
        ctx.shape = x.shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (winner,) = ctx.saved_tensors
        images, channels, height, width = ctx.shape
        dy = dy.contiguous(memory_format=torch.channels_last)
        dx = torch.empty(ctx.shape, dtype=dy.dtype, device=dy.device, memory_format=torch.channels_last)
        inputs, cols = images * height * width, _cols(channels)
        rows = 2048 // cols
        with torch.cuda.device_of(dy):
            kernels.unpooled_map[(-(-inputs // rows) * -(-channels // cols),)](
                dy,
                winner,
                dx,
                inputs,
                height,
                width,
                *dy.shape[2:],
                channels,
                ROWS=rows,
                COLS=cols,
                **_LAUNCH,
            )
        return dx


def fused_max_pool(x: Tensor) -> Tensor:
    """F.max_pool2d(x, 3, stride=2, padding=1), with its gradient.

    Args:
        x: bf16, fp16 or fp32 [N, C, H, W], channels_last.

    Returns:
        float [N, C, (H + 1) // 2, (W + 1) // 2], channels_last.
    """
    return _FusedPool.apply(x)
