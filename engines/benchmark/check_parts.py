"""The parts of a GPU check: what each measures, how long it should take, and when it is stopped."""

from dataclasses import dataclass

from dataio.core.errors import UserError

# Seconds of one whole check, after which parts that are left are recorded as not run.
DEADLINE = 585.0


@dataclass(frozen=True)
class CheckPart:
    """A part, run in a process of its own.

    Attributes:
        expected: seconds on an H100. limit: seconds after which it is stopped.
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
# Drawing and sharding the images, before the first part.
DATA = CheckPart("data", "drawing and sharding images", 30, 90)


def chosen_parts(text: str) -> list[CheckPart]:
    """The parts of a list such as "step,tars", in the order of `PARTS`; "" means all but the optional.

    Raises:
        UserError: a name that is not a part.
    """
    names = {name.strip() for name in text.split(",") if name.strip()}
    if unknown := sorted(names - PARTS.keys()):
        raise UserError(f"--parts {unknown[0]}: no such part; expected some of {','.join(PARTS)}")
    return [part for part in PARTS.values() if (part.name in names if names else not part.optional)]
