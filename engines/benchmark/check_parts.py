"""The parts of the checks of one GPU and of several: what each measures, how long it takes, when it is stopped."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from dataio.core.errors import UserError

# Seconds of one whole check, after which parts that are left are recorded as not run.
DEADLINE = 585.0


@dataclass(frozen=True)
class CheckPart:
    """A part, run in a process of its own.

    Attributes:
        expected: seconds on an H100, or on eight. limit: seconds after which it is stopped.
        optional: runs only where it is named.
    """

    name: str
    what: str
    expected: float
    limit: float
    optional: bool = False


PARTS = {
    part.name: part
    for part in (
        CheckPart("tests", "tests/gpu", 80, 180),
        CheckPart("step", "ResNet-50's step alone: norms fused or plain, CUDA graph on or off", 50, 90),
        CheckPart("tars", "the same from tars through DALI", 20, 60),
        CheckPart("ghosts", "global batch 1,024 in ghost batches of 32", 30, 70),
        CheckPart("decode", "decoding and augmenting alone", 30, 60),
        CheckPart("augment", "training with jpeg, blur, resize and erase", 30, 70),
        CheckPart("evaluate", "evaluation and prediction beside loader and model alone", 40, 80),
        CheckPart("cifake", "the speed run on CIFAKE-like shards", 30, 60),
        CheckPart("checkpoint", "how long a save stops training", 20, 45),
        CheckPart("finetune", "TinyLLaVA, ours and upstream's recipe", 70, 120),
        CheckPart("peers", "timm's and torchvision's loops, and DALI with plain PyTorch", 50, 100),
        CheckPart("compile", "the step under torch.compile", 75, 130, optional=True),
    )
}
MULTI_PARTS = {
    part.name: part
    for part in (
        CheckPart("nccl", "all-reduce by size", 25, 60),
        CheckPart("ddp", "the same losses on one GPU and on several, the same weights on each", 60, 110),
        CheckPart("graphs", "the same losses with CUDA graph and without, on all GPUs", 45, 90),
        CheckPart("scaling", "images/s of the step and from shards on 1, 2, 4, ... and all GPUs", 120, 190),
        CheckPart("launchers", "torchrun and deepspeed, on one GPU and on all", 110, 180),
        CheckPart("resume", "stopped on all GPUs, continued on fewer", 80, 140),
    )
}
# Drawing and sharding the images, before the first part.
DATA = CheckPart("data", "drawing and sharding images", 30, 120)


@dataclass(frozen=True)
class CheckKind:
    """A check: its command, what its file says of itself, its parts.

    Attributes:
        title: in messages. blind: parts that need no images.
    """

    command: str
    title: str
    schema: str
    parts: Mapping[str, CheckPart] = field(repr=False)
    blind: frozenset[str] = frozenset()


ONE_GPU = CheckKind("gpu-check", "GPU check", "telltale-gpu-check", PARTS, frozenset({"tests", "cifake"}))
MULTI_GPU = CheckKind(
    "multigpu-check", "multi-GPU check", "telltale-multigpu-check", MULTI_PARTS, frozenset({"nccl"})
)


def chosen_parts(text: str, parts: Mapping[str, CheckPart] = PARTS) -> list[CheckPart]:
    """The parts of a list such as "step,tars", in the order of `parts`; "" means all but the optional.

    Raises:
        UserError: a name that is not a part.
    """
    names = {name.strip() for name in text.split(",") if name.strip()}
    if unknown := sorted(names - parts.keys()):
        raise UserError(f"--parts {unknown[0]}: no such part; expected some of {','.join(parts)}")
    return [part for part in parts.values() if (part.name in names if names else not part.optional)]
