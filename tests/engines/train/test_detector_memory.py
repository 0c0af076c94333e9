"""The estimate of a detector's memory, beside what the optimizer and autograd hold."""

import pytest

from engines.config.detector import from_dict
from engines.train.detector_memory import estimate_detector_memory
from engines.train.optim import build_optimizer
from models.detector.dual_head import DualHead


def estimated(precision="fp32", size=32, **sections):
    config = from_dict({"model": {"backbone": "resnet18"}, "data": {"size": size}, **sections})
    model = DualHead(config.model, ("nature", "adm"), ("cat", "dog"))
    return config, model, estimate_detector_memory(model, config, precision)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_state_is_what_a_step_leaves(name):
    config, model, memory = estimated(optim={"name": name})
    optimizer = build_optimizer(model, config.optim)
    generator_logits, object_logits = model(model.backbone.conv1.weight.new_zeros(2, 3, 32, 32))
    (generator_logits.sum() + object_logits.sum()).backward()
    optimizer.step()
    held = sum(parameter.nbytes + parameter.grad.nbytes for parameter in model.parameters())
    moments = [value for state in optimizer.state.values() for value in state.values()]
    held += sum(value.nbytes for value in moments if value.ndim > 0 and value.numel() > 1)
    assert memory.state == pytest.approx(held, rel=1e-3)


def test_averaged_weights_are_another_copy():
    _, model, plain = estimated()
    _, _, averaged = estimated(train={"ema": 0.9})
    assert averaged.state - plain.state == 4 * sum(parameter.numel() for parameter in model.parameters())


def test_activations_grow_with_the_area_and_halve_with_the_width():
    small, large, half = (
        estimated(*words)[2].image for words in (("fp32", 64), ("fp32", 128), ("bf16", 128))
    )
    assert large / small == pytest.approx(4, rel=0.1)
    assert large / half == pytest.approx(2, rel=0.1)


def test_a_frozen_backbone_keeps_next_to_nothing():
    frozen = estimated(train={"frozen_epochs": -1})[2].image
    assert 0 < frozen < 0.2 * estimated()[2].image
