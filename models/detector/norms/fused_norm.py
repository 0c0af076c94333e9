"""Batch norm, addition and activation in three launches forward and three backward.

Maps are read and written (per value, see `traffic`): forward once for the statistics, then once
(and the residual once) to write the output; backward the gradient and the input (and, behind a
residual, the output) once for the sums, then the gradient and the input once to write dx.
Kept for the backward pass: the input, two numbers per ghost batch and channel, and with a residual
the output, which the next layer keeps anyway. `import` fails without Triton.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.detector.norms import fused_kernels as kernels

_NUMBERS = {"none": kernels.NONE, "relu": kernels.RELU, "gelu": kernels.GELU}
# Multiply-adds in one rounding; newer versions of Triton warn unless this is said.
_LAUNCH = {"num_warps": 8, "enable_fp_fusion": True}
FUSED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Tiling:
    """How programs share a map of [rows, channels] per ghost batch.

    Attributes:
        cols: channels of a program, a power of two.
        reduce_rows, reduce_tiles: rows of a reduction's tile, and tiles of a ghost batch.
        splits: programs that share a ghost batch's tiles in a reduction.
        merge_splits: a power of two, at least `splits`.
        map_rows, map_tiles: rows of an elementwise program, and programs, per ghost batch.
    """

    cols: int
    reduce_rows: int
    reduce_tiles: int
    splits: int
    merge_splits: int
    map_rows: int
    map_tiles: int


@cache
def tiling(rows: int, channels: int, multiprocessors: int) -> Tiling:
    """The tiling for ghost batches of `rows` rows.

    It does not depend on how many ghost batches a pass holds, so that neither do the bits of
    their statistics. A reduction's tile of 2,048 values is 8 a thread, one load of 16 bytes in
    half precision, and its accumulators leave room for several programs on a multiprocessor;
    four of them, each with several loads under way, suffice even for a single ghost batch.
    """
    cols = min(128, max(16, 1 << (channels - 1).bit_length()))
    col_blocks = -(-channels // cols)
    reduce_rows, map_rows = 2048 // cols, 8192 // cols
    tiles = -(-rows // reduce_rows)
    splits = max(1, min(tiles, -(-4 * multiprocessors // col_blocks), 512))
    # Few sizes, since each is compiled.
    merge_splits = next(size for size in (32, 128, 512) if size >= splits)
    return Tiling(cols, reduce_rows, tiles, splits, merge_splits, map_rows, -(-rows // map_rows))


@cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1  # the interpreter: several splits, few programs
    return torch.cuda.get_device_properties(device).multi_processor_count


def _rows_of(x: Tensor, ghosts: int) -> tuple[int, int, Tiling]:
    rows, channels = x.shape[0] * x.shape[2] * x.shape[3] // ghosts, x.shape[1]
    return rows, channels, tiling(rows, channels, _multiprocessors(x.device))


def _statistics(x: Tensor, ghosts: int) -> Tensor:
    """Mean and biased variance, float32 [2, ghosts, C]."""
    rows, channels, plan = _rows_of(x, ghosts)
    parts = x.new_empty((2, ghosts, plan.splits, channels), dtype=torch.float32)
    statistics = x.new_empty((2, ghosts, channels), dtype=torch.float32)
    kernels.partial_statistics[(plan.splits * -(-channels // plan.cols), ghosts)](
        x,
        parts,
        rows,
        channels,
        plan.reduce_tiles,
        plan.splits,
        ROWS=plan.reduce_rows,
        COLS=plan.cols,
        EVEN=channels % plan.cols == 0,
        **_LAUNCH,
    )
    kernels.merged_statistics[(-(-channels // 16), ghosts)](
        parts,
        statistics,
        rows,
        channels,
        plan.reduce_tiles,
        plan.splits,
        ROWS=plan.reduce_rows,
        SPLITS=plan.merge_splits,
        COLS=16,
        **_LAUNCH,
    )
    return statistics


def _normalized(
    x: Tensor,
    residual: Tensor | None,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    running: tuple[Tensor, Tensor] | None,
    ghosts: int,
    momentum: float,
    eps: float,
    activation: str,
) -> Tensor:
    rows, channels, plan = _rows_of(x, ghosts)
    y = torch.empty_like(x)
    kernels.normalized_map[(plan.map_tiles * -(-channels // plan.cols), ghosts)](
        x,
        x if residual is None else residual,
        y,
        mean,
        var,
        weight,
        bias,
        mean if running is None else running[0],
        var if running is None else running[1],
        rows,
        channels,
        eps,
        momentum,
        ACT=_NUMBERS[activation],
        RESIDUAL=residual is not None,
        UPDATE=running is not None,
        ROWS=plan.map_rows,
        COLS=plan.cols,
        **_LAUNCH,
    )
    return y


class _FusedNorm(torch.autograd.Function):
    """activation(ghost batch norm(x) + residual) in training mode."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        running: tuple[Tensor, Tensor] | None,
        ghosts: int,
        momentum: float,
        eps: float,
        activation: str,
        split: bool,
    ) -> Any:
        with torch.cuda.device_of(x):
            statistics = _statistics(x, ghosts)
            mean, var = statistics
            y = _normalized(x, residual, mean, var, weight, bias, running, ghosts, momentum, eps, activation)
        ctx.with_residual = residual is not None
        saved = None
        if residual is not None and activation != "none":
            saved = y if activation == "relu" else residual
        ctx.save_for_backward(x, weight, bias, statistics, saved)
        ctx.ghosts, ctx.eps, ctx.activation = ghosts, eps, activation
        ctx.set_materialize_grads(False)
        # Not a view, which would forbid what follows to work in place.
        return (y, y.new_empty(0).set_(y)) if split else y  # type: ignore[call-overload]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, bias, statistics, saved = ctx.saved_tensors
        given = [g.contiguous(memory_format=torch.channels_last) for g in gradients if g is not None]
        if not given:
            return (None,) * 10
        dy, other = given[0], given[-1]
        if len(given) == 2 and saved is None:  # no sum would be written
            dy = other = dy + other
        rows, channels, plan = _rows_of(x, ctx.ghosts)
        mean, var = statistics
        activation = _NUMBERS[ctx.activation]
        dz = dy if saved is None else torch.empty_like(x)
        dx, sums, affine = (
            torch.empty_like(x),
            torch.empty_like(statistics),
            x.new_empty((2, channels), dtype=torch.float32),
        )
        parts = x.new_empty((2, ctx.ghosts, plan.splits, channels), dtype=torch.float32)
        col_blocks = -(-channels // plan.cols)
        with torch.cuda.device_of(x):
            kernels.partial_gradients[(plan.splits * col_blocks, ctx.ghosts)](
                dy,
                other,
                x,
                x if saved is None else saved,
                dz,
                mean,
                var,
                weight,
                bias,
                parts,
                rows,
                channels,
                plan.reduce_tiles,
                plan.splits,
                ctx.eps,
                ACT=activation,
                RESIDUAL=saved is not None,
                OTHER=other is not dy,
                ROWS=plan.reduce_rows,
                COLS=plan.cols,
                STAGES=3,
                **_LAUNCH,
            )
            kernels.merged_gradients[(-(-channels // 16), ctx.ghosts)](
                parts,
                sums,
                channels,
                plan.splits,
                SPLITS=plan.merge_splits,
                COLS=16,
                **_LAUNCH,
            )
            kernels.input_gradient[(plan.map_tiles * col_blocks, ctx.ghosts)](
                dz,
                x,
                dx,
                mean,
                var,
                weight,
                bias,
                sums,
                affine[0],
                affine[1],
                rows,
                channels,
                ctx.eps,
                ACT=activation if saved is None else kernels.NONE,
                ROWS=plan.map_rows,
                COLS=plan.cols,
                **_LAUNCH,
            )
        dweight, dbias = affine[0].to(weight.dtype), affine[1].to(bias.dtype)
        return dx, dz if ctx.with_residual else None, dweight, dbias, None, None, None, None, None, None


def fused_training_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    running: tuple[Tensor, Tensor] | None,
    *,
    ghosts: int,
    momentum: float,
    eps: float,
    activation: str,
    split: bool = False,
) -> Any:
    """activation(norm(x) + residual) by the statistics of each ghost batch, with its gradients.

    Args:
        x: of `FUSED_DTYPES`, [N, C, H, W], channels_last. residual: the same, or None.
        weight, bias: float [C]; their gradients are summed in float32.
        running: mean and variance, float [C], updated in place as in `GhostNorm.forward`; or None.
        activation: "none", "relu" or "gelu".
        split: return the output twice, for two uses: their gradients are then added by the kernel
            that reads them, not by one of PyTorch's that reads both and writes the sum.

    Raises:
        ValueError: a channel of a ghost batch has a single value.
    """
    if x.shape[0] * x.shape[2] * x.shape[3] <= ghosts:
        raise ValueError(f"Expected more than 1 value per channel when training, got {tuple(x.shape)}")
    # A momentum of integer 1 would be compiled as another kernel.
    momentum = float(momentum)
    return _FusedNorm.apply(x, residual, weight, bias, running, ghosts, momentum, eps, activation, split)


def fused_evaluation_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    *,
    eps: float,
    activation: str,
) -> Tensor:
    """activation((x - mean) / sqrt(var + eps) * weight + bias + residual) in one launch, without gradients.

    Args:
        x, residual, weight, bias, activation: see `fused_training_norm`. mean, var: float [C].
    """
    with torch.cuda.device_of(x):
        return _normalized(x, residual, mean, var, weight, bias, None, 1, 0.0, eps, activation)


def try_kernels() -> None:
    """Run the smallest norm on the current GPU, if there is one; raises what Triton raises."""
    if torch.cuda.is_available():
        x, ones = torch.zeros(1, 16, 1, 1, device="cuda"), torch.ones(16, device="cuda")
        fused_evaluation_norm(x, None, ones, ones, ones, ones, eps=1.0, activation="none")
