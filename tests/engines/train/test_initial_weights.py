"""Weights of torchvision's names: looked for on this machine, in a folder as torch.hub fills it."""

import re

import pytest
import torch
import torchvision

from dataio.core.errors import UserError
from engines.cluster.preflight import choose_run
from engines.cluster.submit import Request, check_weights
from engines.config.detector import Config
from engines.config.parser import parse_as
from engines.runtime.paths import CONFIGS
from engines.train.initial_weights import weights_files
from launch import train
from tests.support import flags

FLAGSHIP = CONFIGS / "resnet50_genimage.yaml"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """TORCH_HOME without weights; returns where torch.hub keeps them."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("RANK", raising=False)
    folder = tmp_path / "home" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def write_weights(hub, backbone, name):
    """Random weights in the file that torchvision would download."""
    file = hub / torchvision.models.get_weight(name).url.rpartition("/")[2]
    torch.save(torchvision.models.get_model(backbone).state_dict(), file)
    return file


def test_the_flagship_s_weights_are_asked_for_with_the_command_that_fetches_them(hub, repo_root, tmp_path):
    words = ["--run.dir", str(tmp_path / "run")]
    config = parse_as(Config, words, FLAGSHIP)
    with pytest.raises(UserError) as caught:
        weights_files(config)
    message = str(caught.value)
    # The command names weights that torchvision has; what they download is what is looked for.
    (name,) = re.findall(r"get_weight\('(.+?)'\)\.get_state_dict\(\)", message)
    assert torchvision.models.get_weight(name) is torchvision.models.ResNet50_Weights.IMAGENET1K_V2
    configs = {"gpu_config": str(FLAGSHIP), "cpu_config": str(FLAGSHIP)}
    for refusing in (
        lambda: check_weights(Request(str(FLAGSHIP), flags=tuple(words)), repo_root),
        lambda: choose_run(
            "launch/train.py", words, gpu_config=str(FLAGSHIP), cpu_config=str(FLAGSHIP), root=repo_root
        ),
    ):
        with pytest.raises(UserError) as again:
            refusing()
        assert str(again.value) == message
    check_weights(Request(str(FLAGSHIP), flags=(*words, "--model.weights", "")), repo_root)
    file = hub / torchvision.models.get_weight(name).url.rpartition("/")[2]
    file.touch()
    check_weights(Request(str(FLAGSHIP), flags=tuple(words)), repo_root)
    chosen = choose_run("launch/train.py", words, **configs, root=repo_root)
    assert chosen.files["model.weights"] == file


def test_a_downloaded_file_is_loaded(hub, tiny_shards, tmp_path, capsys):
    changes = {"model__stem": "imagenet", "data__size": 64, "data__crop": "random_resized", "data__pad": 0}
    words = flags(data__shards=tiny_shards, run__dir=tmp_path / "run", **changes)
    words += ["--model.weights", "IMAGENET1K_V1"]
    assert train.main(["--dry-run", *words]) == 0
    assert "IMAGENET1K_V1 is not on this machine and will be downloaded" in capsys.readouterr().out
    write_weights(hub, "resnet18", "ResNet18_Weights.IMAGENET1K_V1")
    assert train.main(["--dry-run", *words]) == 0
    assert "weights: IMAGENET1K_V1; 120 tensors loaded" in capsys.readouterr().out


def test_a_run_that_began_from_scratch_continues_so(hub, tiny_shards, tmp_path, capsys):
    words = flags(data__shards=tiny_shards, run__dir=tmp_path / "run", train__steps=2, checkpoint__every=1)
    assert train.main(words) == 0
    run = tmp_path / "run"
    (run / "checkpoints" / "step_00000002.pt").unlink()
    (run / "final.safetensors").unlink()
    words += ["--model.weights", "IMAGENET1K_V1"]  # which are not here, and would not fit
    assert weights_files(parse_as(Config, words, CONFIGS / "quickstart.yaml")) == {}
    assert train.main(["--dry-run", *words]) == 0
    said = capsys.readouterr().out
    assert "continues after step 1 of 2" in said and "weights: random" in said
    assert train.main(words) == 0
    assert (run / "final.safetensors").is_file()
    assert "weights: ''" in (run / "config.yaml").read_text()
