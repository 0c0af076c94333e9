"""Command lines for several GPUs: the batch that they name can be shared by the machine that they name."""

import re
import shlex

import pytest

from engines.config.detector import Config
from engines.config.parser import parse_as
from engines.train.batch_plan import plan_batches
from tests.docs.pages import ROOT

PER_NODE = 8  # GPUs
GENIMAGE = "configs/resnet50_genimage.yaml"
# The log is a record: its commands are of their day.
FILES = [
    ROOT / "README.md",
    *(page for page in sorted((ROOT / "docs").rglob("*.md")) if page.name != "log.md"),
    *sorted((ROOT / "configs").rglob("*.yaml")),
    *sorted((ROOT / "slurm").glob("*.sh")),
    *sorted((ROOT / "launch").glob("*.py")),
]
_START = re.compile(
    r"(sbatch\s[^`\n]*slurm/train_resnet50\.sh|torchrun\s[^`\n]*launch/train\.py"
    r"|telltale train\b|telltale submit\b)([^`\n]*)"
)


def detector_commands():
    """(place, start, arguments) of each command that trains the detector, with what a line's end continues."""
    for path in FILES:
        # A comment's "#" stands before a continued line, too.
        text = re.sub(r"\\\n#?\s*", " ", path.read_text(encoding="utf-8"))
        for start, rest in _START.findall(text):
            words = shlex.split(
                re.split(r"\s{2,}| #|,? which | as ", f"{rest} ", maxsplit=1)[0], comments=True
            )
            yield str(path.relative_to(ROOT)), start, words


def number(pattern, text, default):
    match = re.search(pattern, text)
    return int(match[1]) if match else default


def machines():
    """(place, processes, configuration's file, flags) of the commands that say how many GPUs they are for."""
    for place, start, words in detector_commands():
        line = " ".join([start, *words])
        file = next((word for word in words if word.endswith(".yaml")), None)
        if "tinyllava" in (file or "") or "runs/" in (file or ""):
            continue
        if start.startswith("torchrun"):
            processes = number(r"--nproc-per-node=(\d+)", line, 1)
        elif start.startswith("sbatch"):
            per_node = number(r"--gpus-per-node=(\d+)", line, PER_NODE)
            processes, file = number(r"--nodes=(\d+)", line, 1) * per_node, file or GENIMAGE
        elif "submit" in start:
            nodes = number(r"--nodes (\d+)", line, 0)
            if not nodes:
                continue  # the quickstart, on a node without GPUs
            processes = nodes * PER_NODE
        else:
            processes = number(r"--gpus (\d+)", line, 1)  # without it, as many as the batch allows
        dotted = [i for i, word in enumerate(words) if re.match(r"--[a-z]+\.[a-z_.]+$", word)]
        flags = [word for i in dotted for word in words[i : i + 2]]
        yield place, processes, file or "configs/quickstart.yaml", flags


def test_the_commands_are_found():
    places = [(place, processes) for place, processes, _, _ in machines()]
    for expected in (
        ("README.md", 32),
        ("docs/slurm.md", 8),
        ("docs/slurm.md", 16),
        ("docs/slurm.md", 32),
        ("docs/training.md", 8),
        ("docs/howto/cluster.md", 32),
        ("configs/resnet50_genimage.yaml", 8),
        ("configs/resnet50_genimage_4096.yaml", 32),
        ("slurm/train_resnet50.sh", 8),
        ("slurm/train_resnet50.sh", 32),
        ("launch/submit.py", 32),
    ):
        assert expected in places


@pytest.mark.parametrize(
    ("place", "processes", "file", "flags"),
    [pytest.param(*machine, id=f"{machine[0]}, {machine[1]}") for machine in machines()],
)
def test_the_batch_can_be_shared(place, processes, file, flags):
    config = parse_as(Config, flags, ROOT / file)
    plan = plan_batches(config, processes)
    assert sum(plan.micro_batches) * plan.micro_batch == plan.global_batch
    if file.startswith("configs/resnet50_genimage"):
        assert plan.pass_images >= 128, f"{place}: {processes} GPUs have {plan.pass_images} images a pass"
        # The linear scaling rule from 0.1 for 256 images.
        assert plan.learning_rate == pytest.approx(0.1 * plan.global_batch / 256)


def test_the_two_files_are_one_experiment_at_two_batches():
    one, large = (
        parse_as(Config, [], ROOT / name) for name in (GENIMAGE, "configs/resnet50_genimage_4096.yaml")
    )
    assert one.train.micro_batch == large.train.micro_batch == 32
    assert (one.train.global_batch, large.train.global_batch) == (1024, 4096)
    assert (one.train.epochs, one.data, one.model, one.loss) == (
        large.train.epochs,
        large.data,
        large.model,
        large.loss,
    )
    # Goyal et al. 2017 warm up over 5 epochs.
    assert round(large.optim.warmup * large.train.epochs) == 5
