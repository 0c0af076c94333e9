"""Finetuning on any number of processes and in every ZeRO stage: the same losses."""

import pytest
import torch
from safetensors.torch import load_file

from engines.mlm.trainer import load_unfrozen
from models.tinyllava.checkpoint import load_tinyllava
from models.tinyllava.model import without_zero3_init
from tests.conversations import LORA, PARTIAL, assert_equal_losses, lines, losses

# DeepSpeed compiles its operators at their first use on a machine, which takes minutes.
pytestmark = pytest.mark.timeout(1200)


@pytest.mark.slow
def test_two_processes_under_zero_2_and_3_train_as_one_does(alone, second, third):
    expected = losses(alone[0])
    assert len(expected) == 8
    assert_equal_losses(losses(second[0]), expected)
    assert_equal_losses(losses(third[0]), expected)
    assert "DeepSpeed ZeRO-3, 2 x cpu" in third[1]
    before, after = (load_file(run[0] / "model" / "model.safetensors") for run in (alone, third))
    assert before.keys() == after.keys()
    assert max(float((before[name] - after[name]).abs().max()) for name in before) < 1e-3


@pytest.mark.long
def test_zero_1_trains_as_one_process_does(alone, finetune):
    assert_equal_losses(losses(finetune(2, 1)[0]), losses(alone[0]))


def check_adapter(folder):
    """RUN/model is the base with what learnt beside the adapter, and the adapter merged."""
    from peft import PeftModel

    with without_zero3_init():
        base, _ = load_tinyllava(folder / "base")
        load_unfrozen(base, folder / "adapter")
        merged = PeftModel.from_pretrained(base, folder / "adapter").merge_and_unload().state_dict()
    saved = load_file(folder / "model" / "model.safetensors")
    assert merged.keys() == saved.keys()
    assert [name for name in saved if not torch.equal(saved[name], merged[name])] == []
    start = load_file(folder / "base" / "model.safetensors")
    changed = {name for name in saved if not torch.equal(saved[name], start[name])}
    assert "model.language_model.layers.0.self_attn.q_proj.weight" in changed
    assert "model.multi_modal_projector.linear_1.weight" in changed
    assert "model.vision_tower.encoder.layers.1.mlp.fc1.weight" in changed
    assert not any("encoder.layers.0." in name or "lm_head" in name for name in changed)


@pytest.mark.slow
def test_adapters_under_zero_3_save_merge_and_reload(finetune):
    folder, output = finetune(2, 3, *LORA, *PARTIAL, "--train.gradient_checkpointing", "true")
    check_adapter(folder)
    assert "language lora, connector full, vision partial" in output


@pytest.mark.long
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_adapters_train_alike_in_stages_2_and_3(finetune, precision):
    found = [
        finetune(n, stage, *LORA, *PARTIAL, "--model.precision", precision)[0]
        for n, stage in ((1, 2), (2, 2), (2, 3))
    ]
    for folder in found[1:]:
        assert_equal_losses(losses(folder), losses(found[0]), 1e-5 if precision == "fp32" else 3e-2)
    if precision == "fp32":
        check_adapter(found[1])


@pytest.mark.long
def test_dora_and_an_offloaded_optimiser(alone, finetune):
    dora, _ = finetune(2, 3, *LORA, *PARTIAL, "--tune.language", "dora")
    assert losses(dora)[-1][2] < losses(dora)[0][2]
    for file in ("zero2_offload", "zero3_offload"):
        folder, _ = finetune(2, 2, "--deepspeed", f"configs/deepspeed/{file}.json")
        # DeepSpeed's own AdamW on the host rounds differently.
        assert_equal_losses(losses(folder), losses(alone[0]), 1e-3)


@pytest.mark.slow
def test_the_references_averaging_weighs_batches_alike(alone, finetune):
    words = ("--train.loss", "batches", "--train.micro_batch", "3")  # micro-batches of 3, 3 and 2
    by_batch = losses(finetune(1, 2, *words)[0])
    assert by_batch[0][2] != losses(alone[0])[0][2]
    # One of the two processes has one micro-batch less than the other.
    assert_equal_losses(losses(finetune(2, 2, *words)[0]), by_batch)


@pytest.mark.slow
def test_accumulated_gradients_are_those_of_the_whole_batch(alone, finetune):
    whole, output = finetune(1, 2, "--train.micro_batch", "8", "--train.steps", "1")
    first, expected = lines(alone[0])[0], lines(whole)[0]
    assert first["step"] == expected["step"] == 1
    assert first["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert first["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    assert "accumulation" not in output + alone[1]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_three_processes_train_as_one_does(alone, finetune, stage):
    """8 conversations are 2, 3 and 3: two passes each, of at most 2."""
    folder, output = finetune(3, stage, "--train.micro_batch", "2")
    assert f"DeepSpeed ZeRO-{stage}, 3 x cpu" in output
    assert_equal_losses(losses(folder), losses(alone[0]))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.long)])
def test_more_processes_than_conversations_of_a_step(finetune, stage):
    words = ("--train.global_batch", "2", "--train.steps", "3")
    assert_equal_losses(losses(finetune(3, stage, *words)[0]), losses(finetune(1, stage, *words)[0]))
