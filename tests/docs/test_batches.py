"""Command lines for several GPUs: the machine that they name can run them, by --dry-run."""

import re
import shlex

import pytest

from dataio.images.codec import preset_policy
from dataio.layouts.genimage import GenImageLayout
from dataio.layouts.synthetic import write_synthetic
from dataio.sharding.job import write_shards
from engines.config.detector import Config
from engines.config.parser import parse_as
from engines.train.batch_plan import plan_batches
from launch import finetune_mlm, train
from tests.conversations import write_conversations
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


_FINETUNING = re.compile(
    r"(sbatch\s[^`\n]*slurm/finetune_tinyllava\.sh|(?:torchrun|deepspeed)\s[^`\n]*launch/finetune_mlm\.py"
    r"|telltale finetune\b(?!-))([^`\n]*)"
)


def commands(pattern=_START):
    """(place, start, arguments) of each command that trains, with what a line's end continues."""
    for path in FILES:
        # A comment's "#" stands before a continued line, too.
        text = re.sub(r"\\\n#?\s*", " ", path.read_text(encoding="utf-8"))
        for start, rest in pattern.findall(text):
            text_of_command = re.split(r"\s{2,}| #|,? which | as |[.;:]\s", f"{rest} ", maxsplit=1)[0]
            try:
                words = shlex.split(text_of_command, comments=True)
            except ValueError:
                continue  # prose, with a quotation mark
            yield str(path.relative_to(ROOT)), start, words


def number(pattern, text, default):
    match = re.search(pattern, text)
    return int(match[1]) if match else default


def machines():
    """(place, processes, configuration's file, flags) of the commands that say how many GPUs they are for."""
    for place, start, words in commands():
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
            per_node = number(r"--gpus (\d+)", line, 1)
            processes = (
                number(r"--nodes (\d+)", line, 1) * per_node
            )  # without it, as many as the batch allows
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


@pytest.fixture(scope="module")
def many_shards(tmp_path_factory):
    """More than 4,096 training images of 32 px, for the largest documented batch."""
    folder = tmp_path_factory.mktemp("many")
    write_synthetic(folder / "source", images=6000, size=32, seed=4)
    layout = GenImageLayout(folder / "source", val_fraction=0.1)
    write_shards(layout, folder / "shards", preset_policy("default", 32), samples_per_shard=500, quiet=True)
    return folder / "shards"


def distinct(found):
    """Commands for several processes, each once: its first place stands for all."""
    seen: dict[tuple[object, ...], tuple[object, ...]] = {}
    for place, processes, file, flags in found:
        if processes > 1:
            seen.setdefault((processes, file, *flags), (place, processes, file, flags))
    return [pytest.param(*one, id=f"{one[0]}, {one[1]}") for one in seen.values()]


def machine_of(processes):
    """--nodes and --gpus of as many processes."""
    nodes = max(1, processes // PER_NODE)
    return ["--dry-run", "--nodes", str(nodes), "--gpus", str(processes // nodes)]


@pytest.mark.parametrize(("place", "processes", "file", "flags"), distinct(machines()))
def test_the_detector_s_commands_are_planned(
    place, processes, file, flags, many_shards, tmp_path, capsys, monkeypatch
):
    monkeypatch.delenv("RANK", raising=False)
    # The data is what this machine lacks; all else is the command's.
    given = [*flags, "--data.shards", str(many_shards), "--run.dir", str(tmp_path / "run")]
    assert train.main([*machine_of(processes), "--config", str(ROOT / file), *given]) == 0
    said = capsys.readouterr().out
    assert f"each of {processes} processes has" in said and "all checks before the first step passed" in said
    assert not (tmp_path / "run").exists()


def finetuning_machines():
    """(place, processes, configuration's file, flags) of the commands that finetune."""
    for place, start, words in commands(_FINETUNING):
        line = " ".join([start, *words])
        file = next((word for word in words if word.endswith(".yaml")), "configs/tinyllava_quickstart.yaml")
        if "runs/" in file:
            continue
        nodes = number(r"--(?:nodes|nnodes|num_nodes)[= ](\d+)", line, 1)
        alone = 1 if start.startswith("telltale") else PER_NODE
        per_node = number(r"--(?:gpus|num_gpus|nproc-per-node|gpus-per-node)[= ](\d+)", line, alone)
        dotted = [i for i, word in enumerate(words) if re.match(r"--[a-z]+\.[a-z_.]+$", word)]
        yield place, nodes * per_node, file, [word for i in dotted for word in words[i : i + 2]]


def test_the_finetuning_commands_are_found():
    places = [(place, processes) for place, processes, _, _ in finetuning_machines()]
    for expected in (
        ("README.md", 4),
        ("docs/tinyllava.md", 2),
        ("docs/tinyllava.md", 8),
        ("docs/tinyllava.md", 16),
        ("configs/tinyllava_quickstart.yaml", 8),
        ("configs/tinyllava_lora_zero2.yaml", 4),
        ("slurm/finetune_tinyllava.sh", 16),
        ("launch/finetune_mlm.py", 4),
    ):
        assert expected in places, places


@pytest.mark.parametrize(("place", "processes", "file", "flags"), distinct(finetuning_machines()))
def test_the_finetuning_commands_are_planned(place, processes, file, flags, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    write_conversations(tmp_path, 160)
    # The data and the published weights are what this machine lacks; a small model's tower has few layers.
    given = {
        "data.conversations": tmp_path / "train.json",
        "data.images": "",
        "data.val": tmp_path / "val.json",
        "model.weights": "random:tiny",
        "tune.vision_from_layer": 1,
        "run.dir": tmp_path / "run",
    }
    words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    assert finetune_mlm.main([*machine_of(processes), "--config", str(ROOT / file), *flags, *words]) == 0
    said = capsys.readouterr().out
    assert f"each of {processes} processes has" in said and "all checks before the first step passed" in said
    assert not (tmp_path / "run").exists()
