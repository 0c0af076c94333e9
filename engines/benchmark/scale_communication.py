"""What data-parallel training costs in communication, on paper: an alpha-beta model of all-reduce under DDP.

A message of S bytes over a link costs alpha + S / beta. Within a node of n GPUs a ring reduces and
gathers, each 1/n of the bytes goes over its GPU's own network card between the m nodes, so

    T(S) = 2 (n-1) (alpha_1 + S / (n beta_1)) + 2 log2(m) alpha_2 + 2 (m-1)/m S / (n beta_2)

(Thakur, Rabenseifner and Gropp, "Optimization of collective communication operations in MPICH",
2005; the nodes' latency is that of NCCL's trees). DDP sends buckets as backward fills them, one
after another, while it goes on: only what is left after backward is waited for. Then the running
statistics and the counts of the step follow in one message that nothing hides.
"""

import math
from dataclasses import dataclass

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
class Job:
    """One process's step.

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
    """At a number of GPUs: seconds of all messages, of what is waited for, and of the step; images per second."""

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


def buckets(job: Job) -> list[float]:
    """Bytes of DDP's buckets in the order that backward fills them."""
    found, left = [min(job.first_bucket, job.gradient_bytes)], job.gradient_bytes - job.first_bucket
    while left > 0:
        found.append(min(job.bucket, left))
        left -= job.bucket
    return found


def cost(job: Job, gpus: int, network: Network) -> Cost:
    """A step on this many GPUs, each with the same batch.

    Bytes become ready evenly over backward. (A ResNet's come earlier, for most of its weights are
    in its last layers: so this is on the safe side.)
    """
    sent = filled = messages = 0.0
    for size in buckets(job):
        filled += size
        takes = all_reduce(size, gpus, network)
        messages += takes
        sent = max(sent, job.backward * filled / job.gradient_bytes) + takes
    last = all_reduce(job.statistics_bytes, gpus, network)
    waited = max(0.0, sent - job.backward) + last
    alone = job.forward + job.backward
    return Cost(
        gpus,
        messages + last,
        waited,
        alone + waited,
        gpus * job.batch / (alone + waited),
        alone / (alone + waited),
    )
