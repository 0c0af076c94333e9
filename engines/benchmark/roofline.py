"""What this machine could do at best: its memory's and its arithmetic's speed, measured on the spot.

The roofline of Williams, Waterman and Patterson (2009): a computation of I FLOPs per byte of memory
traffic runs at most at min(peak, I x bandwidth) FLOP/s.
"""

import copy
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from models.detector.dual_head import DualHead

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_TRIES = 5


@dataclass(frozen=True)
class Limits:
    """Of one device: bytes per second of memory, FLOP/s of a matrix product or a convolution."""

    bandwidth: float
    flops: float

    def bound(self, intensity: float) -> float:
        """FLOP/s that a computation of this many FLOPs per byte can reach."""
        return min(self.flops, intensity * self.bandwidth)


def _best(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of a few runs, after one that does not count."""
    times = []
    for _ in range(_TRIES + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
    return min(times[1:])


def memory_bandwidth(device: torch.device, mib: int | None = None) -> float:
    """Bytes per second of a large copy, reads and writes both counted, as STREAM's Copy (McCalpin, 1995).

    Args:
        mib: size of the copied array; None takes 1 GiB on a GPU and 256 MiB on a CPU, beyond
            the caches.
    """
    size = (mib or (1024 if device.type == "cuda" else 256)) * 2**20
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / _best(lambda: target.copy_(source), device)


def matmul_flops(device: torch.device, precision: str, side: int | None = None) -> float:
    """FLOP/s of a product of two square matrices in this precision; a multiply-add counts as two.

    Args:
        precision: "fp32", "bf16" or "fp16". side: None takes 8192 on a GPU and 1536 on a CPU.
    """
    side = side or (8192 if device.type == "cuda" else 1536)
    left, right = (torch.randn(side, side, device=device).to(_DTYPES[precision]) for _ in range(2))
    out = torch.empty_like(left)
    return 2 * side**3 / _best(lambda: torch.mm(left, right, out=out), device)


def convolution_flops(device: torch.device, precision: str, images: int | None = None) -> float:
    """FLOP/s of a 3 x 3 convolution of 256 channels at 28 x 28, channels-last.

    Other libraries do it than the product: of an AMD processor MKL's products are no limit.

    Args:
        images: None takes 256 on a GPU and 8 on a CPU.
    """
    count = images or (256 if device.type == "cuda" else 8)
    image, weight = (
        torch.randn(shape, device=device, dtype=_DTYPES[precision]).contiguous(
            memory_format=torch.channels_last
        )
        for shape in ((count, 256, 28, 28), (256, 256, 3, 3))
    )
    with torch.inference_mode():
        seconds = _best(lambda: torch.nn.functional.conv2d(image, weight, padding=1), device)
    return 2 * 9 * 256 * 256 * 28 * 28 * count / seconds


def measure_limits(device: str, precision: str, threads: int) -> Limits:
    """Both, in a process of its own: the one that asks keeps no memory on the device.

    Args:
        threads: of the CPU; unused on a GPU.
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measure, (device, precision, threads))


def _measure(device: str, precision: str, threads: int) -> Limits:
    torch.set_num_threads(threads)
    where = torch.device(device)
    flops = max(matmul_flops(where, precision), convolution_flops(where, precision))
    return Limits(memory_bandwidth(where), flops)


class _Traffic(TorchDispatchMode):
    """Adds up the bytes that operators read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if not func.is_view and func.overloadpacket.__name__ not in _FREE:
            read, written = _bytes(args), _bytes(output)
            self.bytes += read + written
            if "batch_norm" in func.overloadpacket.__name__:
                # Statistics (forward), and the sums of gradients (backward), are a pass of their own.
                self.bytes += read
        return output


_FREE = frozenset(["detach", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"])


def _bytes(values: Any) -> int:
    if isinstance(values, torch.Tensor):
        return values.numel() * values.element_size()
    return sum(map(_bytes, values)) if isinstance(values, tuple | list) else 0


def step_traffic(model: DualHead, batch: int, size: int, precision: str) -> int:
    """Bytes of memory traffic of a forward and backward pass, if nothing is fused and nothing cached.

    The model: every operator reads each of its inputs from memory and writes each of its outputs
    once; batch norm reads its inputs twice (statistics first); all in `precision`. Counted from
    the operators that run, without their numbers (PyTorch's meta device). For ResNet-50 at 224 px
    in bf16 that is about 0.5 GB an image. A device that fuses operators, or whose caches hold
    activations (a CPU at small sizes), does less and may pass the bound that follows from it.

    Args:
        model: on any device; not changed. size: side of the images, pixels.
    """
    shadow = copy.deepcopy(model).to("meta", _DTYPES[precision])
    for parameter in shadow.parameters():
        parameter.grad = None
    image = torch.empty(batch, 3, size, size, device="meta", dtype=_DTYPES[precision])
    with _Traffic() as traffic:
        generator_logits, object_logits = shadow.train()(image)
        (generator_logits.sum() + object_logits.sum()).backward()
    return traffic.bytes
