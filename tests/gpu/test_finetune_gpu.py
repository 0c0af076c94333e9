"""Finetuning on a GPU: precisions and 4-bit weights that a CPU has not."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.conversations import LORA, finetuning_flags, write_conversations
from tests.support import environment

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA GPU: run `pytest tests/gpu` on a machine with one"
)


@pytest.fixture
def finetune(repo_root, tmp_path):
    write_conversations(tmp_path)

    def call(name, stage, *more):
        folder = tmp_path / name
        flags = finetuning_flags(tmp_path, folder, stage, *more)
        done = subprocess.run(
            [sys.executable, str(repo_root / "launch/finetune_mlm.py"), *flags],
            env={**environment(), "CUDA_VISIBLE_DEVICES": "0"},
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert done.returncode == 0, done.stdout + done.stderr[-3000:]
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses = [line["loss"] for line in lines if line["kind"] == "train"]
        assert losses[-1] < losses[0]
        return folder, done.stdout, losses

    return call


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_follows_fp32(finetune, stage):
    _, output, exact = finetune("fp32", stage, "--model.precision", "fp32", "--model.attention", "eager")
    assert f"DeepSpeed ZeRO-{stage}, 1 x cuda, fp32" in output
    folder, _, found = finetune("bf16", stage)
    assert found == pytest.approx(exact, rel=0.03)
    tensors = load_file(folder / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_fp16_trains(finetune):
    finetune("fp16", 2, "--model.precision", "fp16")


def test_four_bits_under_adapters(finetune):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install telltale[qlora]")
    folder, output, _ = finetune("qlora", 2, *LORA, "--tune.language", "qlora")
    assert "language qlora" in output
    assert (folder / "adapter" / "adapter_config.json").is_file()
