r"""The cost of communication in data-parallel training on 8 to 512 GPUs: a model, not a measurement.

    python docs/scaling/communication.py --backbone resnet50 --batch 400 --images-per-second 7950
    python docs/scaling/communication.py --backbone resnet50 --batch 64 --images-per-second 6500 --nic 10

Give the speed of one GPU as measured by `launch/benchmark.py step`.

A message of S bytes over a link costs alpha + S / beta. Within a node of n GPUs a ring reduces and
gathers; each GPU sends 1/n of the bytes over its own network card between the m nodes, so

    T(S) = 2 (n-1) (alpha_1 + S / (n beta_1)) + 2 log2(m) alpha_2 + 2 (m-1)/m S / (n beta_2)

(Thakur, Rabenseifner and Gropp, "Optimization of collective communication operations in MPICH",
2005; the latency between nodes is that of NCCL's trees). DDP sends buckets one after another as
backward fills them, so only what is left after backward costs time. The running statistics and
the counts of the step follow in one message that nothing hides.
"""

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

from engines.stats.text_table import text_table
from engines.train.batchnorm import RunningStatistics
from models.detector.config import ModelConfig
from models.detector.dual_head import DualHead

MIB = 2**20


@dataclass(frozen=True)
class Network:
    """Links of a cluster.

    Attributes:
        per_node: GPUs of a node. nvlink, nic: bytes per second that one GPU sends within and between
            nodes, as reached, not as printed on the box. alpha_node, alpha_net: seconds per message.
    """

    per_node: int = 8
    nvlink: float = 350e9
    nic: float = 40e9
    alpha_node: float = 3e-6
    alpha_net: float = 12e-6


@dataclass(frozen=True)
class Step:
    """One step of one process.

    Attributes:
        gradient_bytes, statistics_bytes: sent in each step, in buckets and in one message after them.
        forward, backward: seconds, without communication. batch: images.
        first_bucket, bucket: DDP's sizes, bytes.
    """

    gradient_bytes: float
    statistics_bytes: float
    forward: float
    backward: float
    batch: int
    first_bucket: float = 1 * MIB
    bucket: float = 25 * MIB


@dataclass(frozen=True)
class Cost:
    """A step at a number of GPUs: seconds of all messages, of the part not hidden, of the step; images/s."""

    gpus: int
    messages: float
    waited: float
    step: float
    images_per_second: float
    efficiency: float


def all_reduce(size: float, gpus: int, network: Network) -> float:
    """Seconds that the sum of `size` bytes over all GPUs takes."""
    if gpus == 1:
        return 0.0
    n = min(gpus, network.per_node)
    m = math.ceil(gpus / n)
    inside = 2 * (n - 1) * (network.alpha_node + size / (n * network.nvlink))
    return (
        inside + 2 * math.log2(m) * network.alpha_net + 2 * (m - 1) / m * size / (n * network.nic)
        if m > 1
        else inside
    )


def buckets(step: Step) -> list[float]:
    """Bytes of DDP's buckets in the order that backward fills them."""
    sizes, left = [min(step.first_bucket, step.gradient_bytes)], step.gradient_bytes - step.first_bucket
    while left > 0:
        sizes.append(min(step.bucket, left))
        left -= step.bucket
    return sizes


def cost(step: Step, gpus: int, network: Network) -> Cost:
    """A step on this many GPUs, each with the same batch.

    Bytes become ready evenly over backward. (A ResNet's come earlier, for most of its weights are
    in its last layers: so this is on the safe side.)
    """
    sent = filled = messages = 0.0
    for size in buckets(step):
        filled += size
        takes = all_reduce(size, gpus, network)
        messages += takes
        sent = max(sent, step.backward * filled / step.gradient_bytes) + takes
    last = all_reduce(step.statistics_bytes, gpus, network)
    waited = max(0.0, sent - step.backward) + last
    alone = step.forward + step.backward
    return Cost(
        gpus,
        messages + last,
        waited,
        alone + waited,
        gpus * step.batch / (alone + waited),
        alone / (alone + waited),
    )


def model_sizes(backbone: str, generators: int, objects: int) -> tuple[int, int]:
    """Numbers of a detector's parameters and of its running statistics."""
    names = [tuple(map(str, range(count))) for count in (generators, objects)]
    model = DualHead(ModelConfig(backbone=backbone), *names)
    return sum(p.numel() for p in model.parameters()), RunningStatistics(model).flat.numel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--backbone", default="resnet50", help="a name of model.backbone")
    add("--generators", type=int, default=9, help="classes of the generator head")
    add("--objects", type=int, default=1000, help="classes of the object head")
    add("--batch", type=int, default=400, help="images of a GPU in a step")
    add("--images-per-second", type=float, default=7950.0, help="of one GPU, measured")
    add("--backward-share", type=float, default=2 / 3, help="of the step's time")
    add("--gpus", default="1,8,16,32,64,128,256,512", help="numbers of GPUs, separated by commas")
    add("--per-node", type=int, default=8, help="GPUs of a node")
    add("--nvlink", type=float, default=350.0, help="GB/s that a GPU sends within its node, as reached")
    add("--nic", type=float, default=40.0, help="GB/s that a GPU sends between nodes, as reached")
    add("--bucket", type=float, default=25.0, help="DDP's buckets, MiB")
    args = parser.parse_args()
    parameters, statistics = model_sizes(args.backbone, args.generators, args.objects)
    seconds = args.batch / args.images_per_second
    step = Step(
        gradient_bytes=4 * parameters,
        statistics_bytes=8 * statistics,
        forward=seconds * (1 - args.backward_share),
        backward=seconds * args.backward_share,
        batch=args.batch,
        bucket=args.bucket * MIB,
    )
    network = Network(args.per_node, args.nvlink * 1e9, args.nic * 1e9)
    print(
        f"{args.backbone}: {4 * parameters / 1e6:.1f} MB of gradients, {8 * statistics / 1e6:.2f} MB of running "
        f"statistics; a step of {args.batch} images alone takes {1000 * seconds:.1f} ms\n"
    )
    costs = [cost(step, int(count), network) for count in args.gpus.split(",")]
    rows = [
        [
            c.gpus,
            f"{1000 * c.messages:.2f}",
            f"{1000 * c.waited:.2f}",
            f"{c.images_per_second:,.0f}",
            f"{c.efficiency:.1%}",
        ]
        for c in costs
    ]
    heads = ["GPUs", "all messages, ms", "not hidden, ms", "images/s", "efficiency"]
    print(text_table(rows, heads, markdown=True, align="rrrrr"))


if __name__ == "__main__":
    main()
