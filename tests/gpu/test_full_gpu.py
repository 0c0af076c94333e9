"""What happens where a GPU has little memory left; these tests wait until no other uses it."""

import subprocess
import sys

import pytest
import torch

from tests.conversations import finetuning_flags, write_conversations
from tests.support import environment
from tests.trainers import build_trainer, train_losses

pytestmark = [
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs a CUDA GPU: run `pytest tests/gpu` on a machine with one"
    ),
    pytest.mark.alone_on_gpu,
]


def fill(left: int) -> torch.Tensor:
    """Take the GPU's memory but for so many bytes."""
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    return torch.empty(max(0, free - left), dtype=torch.uint8, device="cuda")


def test_a_gpu_too_small_is_said_before_anything_is_loaded(repo_root, tmp_path):
    write_conversations(tmp_path)
    held = fill(left=2**30)
    flags = finetuning_flags(tmp_path, tmp_path / "run")
    done = subprocess.run(
        [sys.executable, str(repo_root / "launch/finetune_mlm.py"), *flags],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=280,
    )
    del held
    assert done.returncode == 2
    assert "of memory are needed on each GPU" in done.stderr


def test_passes_are_as_large_as_the_memory_that_is_left(more_shards):
    # ResNet-50 at 224 px takes about 85 MB of activations an image: 256 of them do not fit.
    changes = {
        "data__size": 224,
        "data__crop": "random_resized",
        "data__pad": 0,
        "model__backbone": "resnet50",
        "train__steps": 2,
        "train__global_batch": 256,
        "train__micro_batch": 8,
    }
    held = fill(left=6 * 2**30)
    trainer = build_trainer(more_shards, "cuda:0", **changes)
    assert len(train_losses(trainer, 2)) == 2
    images = [len(each) * 8 for each in trainer.runner.passes]
    del held
    assert sum(images) == 256
    assert 8 <= max(images) < 256
