"""TensorFloat-32 is what the configuration says, in training and wherever a checkpoint is applied."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dataio.core.errors import UserError
from engines.checkpoint.load_model import load_model
from engines.config.detector import Config, TrainConfig, from_dict
from engines.config.values import refuse_changed_keys, to_dict
from engines.predict.detector import Detector
from engines.runtime.precision import set_tf32
from engines.train.build import make_deterministic
from tests.support import write_detector


def chosen() -> set[str]:
    return {
        torch.backends.cuda.matmul.fp32_precision,
        torch.backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
        torch.backends.cudnn.rnn.fp32_precision,  # type: ignore[attr-defined]
    }


@pytest.fixture(autouse=True)
def _as_configured():
    yield
    set_tf32(False)


@pytest.mark.parametrize(("given", "expected"), [(True, "tf32"), (False, "ieee")])
def test_training_sets_what_its_configuration_says(given, expected):
    set_tf32(not given)
    make_deterministic(Config(train=TrainConfig(tf32=given)))
    assert chosen() == {expected}


def test_it_is_off_unless_asked_for_and_cannot_change_in_a_run():
    assert not Config().train.tf32
    stored = to_dict(Config())
    with pytest.raises(UserError, match=r"train\.tf32 is True, but this run was started with False"):
        refuse_changed_keys(stored, Config(train=TrainConfig(tf32=True)))
    del stored["train"]["tf32"]  # a checkpoint from before the key
    refuse_changed_keys(stored, Config())
    assert not from_dict(stored).train.tf32


def test_a_checkpoint_is_applied_as_it_was_trained(tmp_path):
    path = write_detector(tmp_path / "plain.pt")
    state = torch.load(path, weights_only=True)
    state["config"]["train"] = {"tf32": True}
    torch.save(state, tmp_path / "rounded.pt")
    load_model(path)
    assert chosen() == {"ieee"}
    load_model(tmp_path / "rounded.pt")
    assert chosen() == {"tf32"}


def test_each_of_two_detectors_keeps_its_own(tmp_path, tiny_shards):
    path = write_detector(tmp_path / "plain.pt")
    state = torch.load(path, weights_only=True)
    state["config"]["train"] = {"tf32": True}
    torch.save(state, tmp_path / "rounded.pt")
    plain, rounded = Detector(path), Detector(tmp_path / "rounded.pt")
    source = next(Path(tiny_shards).parent.glob("source/**/*.png")).read_bytes()
    for detector, expected in ((plain, "ieee"), (rounded, "tf32"), (plain, "ieee")):
        detector.predict([detector.prepare(source)])
        assert chosen() == {expected}


def test_setting_it_warns_of_nothing():
    words = "import warnings; warnings.simplefilter('error'); "
    words += "from engines.runtime.precision import set_tf32; set_tf32(True); set_tf32(False)"
    subprocess.run([sys.executable, "-c", words], check=True, cwd=Path(__file__).parents[3], timeout=120)
