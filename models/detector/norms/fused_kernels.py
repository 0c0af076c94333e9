"""Triton kernels of batch norm, addition and activation over rows [ghosts * rows, channels].

A channels_last map is such a matrix, contiguous along the channels: each program reads a tile of
rows and up to 128 channels, 16 bytes a thread. Values are float32 inside a kernel. Nothing is
added by atomics: bits repeat. Offsets are 64-bit, since a pass may hold more than 2^31 values.

Reductions start at the end of the tensor, which the kernel before has just written and the L2
cache still holds; elementwise kernels start at its beginning, where the reduction ended.

Import it only where Triton is installed. On the CPU it runs under TRITON_INTERPRET=1, which must be
set before Triton is imported.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from typing import Any

import triton
import triton.language as tl

# Activations by number, for the kernels.
NONE, RELU, GELU = 0, 1, 2


def _kernel(function: Any) -> Any:
    # Sizes change between layers; compiling anew for each that is 1 or a multiple of 16 gains nothing.
    return triton.jit(function, do_not_specialize=["rows", "tiles", "splits"])


@triton.jit
def _activate(z, ACT: tl.constexpr):
    if ACT == 1:
        z = tl.where(z < 0, 0.0, z)  # a maximum would turn NaN into 0
    if ACT == 2:
        z = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    return z


@triton.jit
def _through_activation(dy, z, ACT: tl.constexpr):
    """The gradient before the activation; z is its input or, for ReLU, its output."""
    if ACT == 1:
        dy = tl.where(z <= 0, 0.0, dy)
    if ACT == 2:
        below = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
        dy = dy * (below + z * 0.3989422804014327 * tl.exp(-0.5 * z * z))
    return dy


@triton.jit
def _add_values(mean, m2, count, x):
    """Welford's update of each lane; count is [ROWS, 1]."""
    count += 1.0
    delta = x - mean
    mean += delta * (1.0 / count)
    m2 += delta * (x - mean)
    return mean, m2, count


@_kernel
def partial_statistics(
    x_ptr,
    parts_ptr,
    rows,
    channels,
    tiles,
    splits,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Mean and sum of squared deviations of each split of a ghost batch's rows.

    parts is float32 [2, ghosts, splits, channels]. Split s has the tiles s, s + splits, ...,
    counted from the end. Grid: (splits * column blocks, ghosts).
    """
    blocks = tl.cdiv(channels, COLS)
    split = tl.program_id(0) // blocks
    col = (tl.program_id(0) % blocks) * COLS + tl.arange(0, COLS)
    ghosts = tl.num_programs(1)
    ghost = ghosts - 1 - tl.program_id(1)
    x_ptr += ghost.to(tl.int64) * rows * channels
    row = tl.arange(0, ROWS)
    inner = row[:, None] * channels + col[None, :]
    kept = (col < channels)[None, :]

    # Only the last tile may have fewer rows, and it is the first one here.
    first = (tiles - 1 - split).to(tl.int64) * ROWS
    full = (first + row < rows)[:, None]
    mean = tl.load(x_ptr + first * channels + inner, mask=full & kept, other=0.0).to(tl.float32)
    m2 = tl.zeros((ROWS, COLS), tl.float32)
    count = full.to(tl.float32)
    further = (tiles - 1 - split) // splits
    step = splits.to(tl.int64) * ROWS * channels
    x_ptr += first * channels
    for _ in range(further // 4):  # four at a time, so that more loads are under way
        if EVEN:
            one = tl.load(x_ptr - step + inner)
            two = tl.load(x_ptr - 2 * step + inner)
            three = tl.load(x_ptr - 3 * step + inner)
            four = tl.load(x_ptr - 4 * step + inner)
        else:
            one = tl.load(x_ptr - step + inner, mask=kept, other=0.0)
            two = tl.load(x_ptr - 2 * step + inner, mask=kept, other=0.0)
            three = tl.load(x_ptr - 3 * step + inner, mask=kept, other=0.0)
            four = tl.load(x_ptr - 4 * step + inner, mask=kept, other=0.0)
        x_ptr -= 4 * step
        mean, m2, count = _add_values(mean, m2, count, one.to(tl.float32))
        mean, m2, count = _add_values(mean, m2, count, two.to(tl.float32))
        mean, m2, count = _add_values(mean, m2, count, three.to(tl.float32))
        mean, m2, count = _add_values(mean, m2, count, four.to(tl.float32))
    for _ in range(further % 4):
        x_ptr -= step
        one = tl.load(x_ptr + inner, mask=kept, other=0.0)
        mean, m2, count = _add_values(mean, m2, count, one.to(tl.float32))

    # Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm" (1979), for all lanes.
    joint = tl.sum(mean * count, 0) / tl.sum(count, 0)
    away = mean - joint[None, :]
    joint_m2 = tl.sum(m2 + count * away * away, 0)
    place = (ghost * splits + split).to(tl.int64) * channels + col
    tl.store(parts_ptr + place, joint, mask=col < channels)
    tl.store(parts_ptr + ghosts.to(tl.int64) * splits * channels + place, joint_m2, mask=col < channels)


@_kernel
def merged_statistics(
    parts_ptr,
    statistics_ptr,
    rows,
    channels,
    tiles,
    splits,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Mean and biased variance, float32 [2, ghosts, channels]. Grid: (column blocks, ghosts)."""
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    ghost = tl.program_id(1)
    ghosts = tl.num_programs(1)
    split = tl.arange(0, SPLITS)
    there = (split < splits)[:, None] & (col < channels)[None, :]
    count = ((tiles - 1 - split) // splits + 1) * ROWS
    count = tl.where(split == 0, count - (tiles * ROWS - rows), count).to(tl.float32)[:, None]
    parts_ptr += (ghost * splits).to(tl.int64) * channels
    place = split[:, None] * channels + col[None, :]
    mean = tl.load(parts_ptr + place, mask=there, other=0.0)
    parts_ptr += ghosts.to(tl.int64) * splits * channels
    m2 = tl.load(parts_ptr + place, mask=there, other=0.0)
    joint = tl.sum(tl.where(there, mean * count, 0.0), 0) / rows
    away = mean - joint[None, :]
    var = tl.sum(tl.where(there, m2 + count * away * away, 0.0), 0) / rows
    tl.store(statistics_ptr + ghost * channels + col, joint, mask=col < channels)
    tl.store(statistics_ptr + (ghosts + ghost) * channels + col, var, mask=col < channels)


@_kernel
def normalized_map(
    x_ptr,
    residual_ptr,
    y_ptr,
    mean_ptr,
    var_ptr,
    weight_ptr,
    bias_ptr,
    running_mean_ptr,
    running_var_ptr,
    rows,
    channels,
    eps,
    momentum,
    ACT: tl.constexpr,
    RESIDUAL: tl.constexpr,
    UPDATE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Y = activation(norm(x) + residual); the first programs update the running statistics.

    mean and var (biased) are float32 [ghosts, channels]. Grid: (row tiles * column blocks, ghosts).
    """
    blocks = tl.cdiv(channels, COLS)
    tile = tl.program_id(0) // blocks
    col = (tl.program_id(0) % blocks) * COLS + tl.arange(0, COLS)
    ghost = tl.program_id(1)
    ghosts = tl.num_programs(1)
    kept = col < channels
    mean = tl.load(mean_ptr + ghost * channels + col, mask=kept, other=0.0).to(tl.float32)
    var = tl.load(var_ptr + ghost * channels + col, mask=kept, other=1.0).to(tl.float32)
    weight = tl.load(weight_ptr + col, mask=kept, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + col, mask=kept, other=0.0).to(tl.float32)
    rstd = 1.0 / tl.sqrt(var + eps)

    first = tile.to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    base = (ghost.to(tl.int64) * rows + first) * channels
    inner = row[:, None] * channels + col[None, :]
    mask = (first + row < rows)[:, None] & kept[None, :]
    x = tl.load(x_ptr + base + inner, mask=mask, other=0.0).to(tl.float32)
    # Not x * scale + shift: that loses a small deviation from a large mean.
    z = (x - mean[None, :]) * rstd[None, :] * weight[None, :] + bias[None, :]
    if RESIDUAL:
        z += tl.load(residual_ptr + base + inner, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + base + inner, _activate(z, ACT).to(y_ptr.dtype.element_ty), mask=mask)

    if UPDATE:  # noqa: SIM102 (decided when compiling, the other one when running)
        if (tile == 0) & (ghost == 0):
            means = tl.zeros((COLS,), tl.float32)
            variances = tl.zeros((COLS,), tl.float32)
            for other in range(ghosts):
                means += tl.load(mean_ptr + other * channels + col, mask=kept, other=0.0)
                variances += tl.load(var_ptr + other * channels + col, mask=kept, other=0.0)
            means = means / ghosts
            variances = variances / ghosts * (rows / (rows - 1.0))
            old_mean = tl.load(running_mean_ptr + col, mask=kept, other=0.0).to(tl.float32)
            old_var = tl.load(running_var_ptr + col, mask=kept, other=0.0).to(tl.float32)
            new_mean = (1.0 - momentum) * old_mean + momentum * means
            new_var = (1.0 - momentum) * old_var + momentum * variances
            # With momentum 1 what was there does not count, NaN included.
            new_mean = tl.where(momentum == 1.0, means, new_mean)
            new_var = tl.where(momentum == 1.0, variances, new_var)
            tl.store(running_mean_ptr + col, new_mean, mask=kept)
            tl.store(running_var_ptr + col, new_var, mask=kept)


@_kernel
def partial_gradients(
    dy_ptr,
    other_ptr,
    x_ptr,
    saved_ptr,
    dz_ptr,
    mean_ptr,
    var_ptr,
    weight_ptr,
    bias_ptr,
    parts_ptr,
    rows,
    channels,
    tiles,
    splits,
    eps,
    ACT: tl.constexpr,
    RESIDUAL: tl.constexpr,
    OTHER: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Sums of dz and of dz * normalized x over each split; with a residual also dz itself.

    dz is the gradient before the activation. With OTHER the output's gradient is dy + other.
    saved is the output for ReLU with a residual, the residual for GELU with one. parts and the
    grid are those of `partial_statistics`.
    """
    blocks = tl.cdiv(channels, COLS)
    split = tl.program_id(0) // blocks
    col = (tl.program_id(0) % blocks) * COLS + tl.arange(0, COLS)
    ghosts = tl.num_programs(1)
    ghost = ghosts - 1 - tl.program_id(1)
    kept = col < channels
    mean = tl.load(mean_ptr + ghost * channels + col, mask=kept, other=0.0)
    var = tl.load(var_ptr + ghost * channels + col, mask=kept, other=1.0)
    rstd = 1.0 / tl.sqrt(var + eps)
    weight = tl.load(weight_ptr + col, mask=kept, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + col, mask=kept, other=0.0).to(tl.float32)
    row = tl.arange(0, ROWS)
    inner = row[:, None] * channels + col[None, :]
    start = ghost.to(tl.int64) * rows

    sums = tl.zeros((ROWS, COLS), tl.float32)
    products = tl.zeros((ROWS, COLS), tl.float32)
    # Copies of the coming tiles into shared memory are under way while one is summed.
    for number in tl.range((tiles - 1 - split) // splits + 1, num_stages=STAGES):
        first = (tiles - 1 - split - number * splits).to(tl.int64) * ROWS
        base = (start + first) * channels
        mask = (first + row < rows)[:, None] & kept[None, :]
        dz = tl.load(dy_ptr + base + inner, mask=mask, other=0.0).to(tl.float32)
        if OTHER:
            dz += tl.load(other_ptr + base + inner, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + base + inner, mask=mask, other=0.0).to(tl.float32)
        normal = (x - mean[None, :]) * rstd[None, :]
        if ACT != 0:
            z = normal * weight[None, :] + bias[None, :]
            if RESIDUAL:
                saved = tl.load(saved_ptr + base + inner, mask=mask, other=0.0).to(tl.float32)
                z = saved if ACT == 1 else z + saved
            dz = _through_activation(dz, z, ACT)
            if RESIDUAL:
                tl.store(dz_ptr + base + inner, dz.to(dz_ptr.dtype.element_ty), mask=mask)
        sums += dz
        products += dz * normal
    place = (ghost * splits + split).to(tl.int64) * channels + col
    tl.store(parts_ptr + place, tl.sum(sums, 0), mask=kept)
    parts_ptr += ghosts.to(tl.int64) * splits * channels
    tl.store(parts_ptr + place, tl.sum(products, 0), mask=kept)


@_kernel
def merged_gradients(
    parts_ptr,
    sums_ptr,
    channels,
    splits,
    SPLITS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Sums over the splits, float32 [2, ghosts, channels]. Grid: (column blocks, ghosts)."""
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    ghost = tl.program_id(1)
    ghosts = tl.num_programs(1)
    split = tl.arange(0, SPLITS)
    there = (split < splits)[:, None] & (col < channels)[None, :]
    place = (ghost * splits).to(tl.int64) * channels + split[:, None] * channels + col[None, :]
    sums = tl.sum(tl.load(parts_ptr + place, mask=there, other=0.0), 0)
    parts_ptr += ghosts.to(tl.int64) * splits * channels
    products = tl.sum(tl.load(parts_ptr + place, mask=there, other=0.0), 0)
    tl.store(sums_ptr + ghost * channels + col, sums, mask=col < channels)
    tl.store(sums_ptr + (ghosts + ghost) * channels + col, products, mask=col < channels)


@_kernel
def input_gradient(
    dz_ptr,
    x_ptr,
    dx_ptr,
    mean_ptr,
    var_ptr,
    weight_ptr,
    bias_ptr,
    sums_ptr,
    dweight_ptr,
    dbias_ptr,
    rows,
    channels,
    eps,
    ACT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """dx, and in the first programs the affine gradients, summed over the ghost batches.

    dz is the gradient behind activation `ACT`, which has no residual. The grid is that of `normalized_map`.
    """
    blocks = tl.cdiv(channels, COLS)
    tile = tl.program_id(0) // blocks
    col = (tl.program_id(0) % blocks) * COLS + tl.arange(0, COLS)
    ghost = tl.program_id(1)
    ghosts = tl.num_programs(1)
    kept = col < channels
    mean = tl.load(mean_ptr + ghost * channels + col, mask=kept, other=0.0)
    var = tl.load(var_ptr + ghost * channels + col, mask=kept, other=1.0)
    rstd = 1.0 / tl.sqrt(var + eps)
    weight = tl.load(weight_ptr + col, mask=kept, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + col, mask=kept, other=0.0).to(tl.float32)
    sums = tl.load(sums_ptr + ghost * channels + col, mask=kept, other=0.0) / rows
    products = tl.load(sums_ptr + (ghosts + ghost) * channels + col, mask=kept, other=0.0) / rows

    first = tile.to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    base = (ghost.to(tl.int64) * rows + first) * channels
    inner = row[:, None] * channels + col[None, :]
    mask = (first + row < rows)[:, None] & kept[None, :]
    dz = tl.load(dz_ptr + base + inner, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + base + inner, mask=mask, other=0.0).to(tl.float32)
    normal = (x - mean[None, :]) * rstd[None, :]
    if ACT != 0:
        dz = _through_activation(dz, normal * weight[None, :] + bias[None, :], ACT)
    dx = (dz - sums[None, :] - normal * products[None, :]) * (rstd * weight)[None, :]
    tl.store(dx_ptr + base + inner, dx.to(dx_ptr.dtype.element_ty), mask=mask)

    if (tile == 0) & (ghost == 0):
        dbias = tl.zeros((COLS,), tl.float32)
        dweight = tl.zeros((COLS,), tl.float32)
        for other in range(ghosts):
            dbias += tl.load(sums_ptr + other * channels + col, mask=kept, other=0.0)
            dweight += tl.load(sums_ptr + (ghosts + other) * channels + col, mask=kept, other=0.0)
        tl.store(dbias_ptr + col, dbias, mask=kept)
        tl.store(dweight_ptr + col, dweight, mask=kept)
