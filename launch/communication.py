r"""What communication costs on 8 to 512 GPUs, on paper: see engines/benchmark/scale_communication.py for the model.

    python launch/communication.py --backbone resnet50 --batch 400 --images-per-second 7950
    python launch/communication.py --backbone resnet50 --batch 64 --images-per-second 6500 --nic 10

Give the speed of one GPU as measured (launch/benchmark.py step).
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from dataio.core.errors import UserError
from engines.benchmark.scale_communication import MIB, Job, Network, cost
from engines.config.parser import Parser, parse_int_list
from engines.runtime.command import run_command


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description="Model the cost of communication in data-parallel training.")
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
    args = parser.parse_args(argv)
    gpus = parse_int_list("--gpus", args.gpus, example="8,64,512")
    for name in (
        "batch",
        "images_per_second",
        "per_node",
        "nvlink",
        "nic",
        "bucket",
        "generators",
        "objects",
    ):
        if not args[name] > 0:
            raise UserError(f"--{name.replace('_', '-')} is {args[name]}, expected more than 0")
    if not 0 < args.backward_share < 1:
        raise UserError(f"--backward-share is {args.backward_share}, expected a share in (0, 1)")
    parameters, statistics = _sizes(args.backbone, args.generators, args.objects)
    seconds = args.batch / args.images_per_second
    job = Job(
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
    print("| GPUs | all messages, ms | waited for, ms | images/s | efficiency |\n|---|---|---|---|---|")
    for count in gpus:
        c = cost(job, count, network)
        print(
            f"| {c.gpus} | {1000 * c.messages:.2f} | {1000 * c.waited:.2f} | {c.images_per_second:,.0f} "
            f"| {c.efficiency:.1%} |"
        )
    return 0


def _sizes(backbone: str, generators: int, objects: int) -> tuple[int, int]:
    """Numbers of a detector's parameters and of its running statistics."""
    import torch

    from engines.train.batchnorm import RunningStatistics
    from models.detector.config import ModelConfig
    from models.detector.dual_head import DualHead

    with torch.device("cpu"):
        model = DualHead(
            ModelConfig(backbone=backbone),
            tuple(str(i) for i in range(generators)),
            tuple(str(i) for i in range(objects)),
        )
    return sum(p.numel() for p in model.parameters()), RunningStatistics(model).flat.numel()


if __name__ == "__main__":
    run_command(main)
