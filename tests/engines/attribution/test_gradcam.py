"""Grad-CAM: by hand on a tiny network, on every kind of backbone, and that it leaves no trace."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dataio.core.errors import UserError
from engines.attribution.gradcam import (
    generator_score,
    grad_cam,
    grad_cams,
    last_convolution,
    object_score,
    overlay,
    verdict_score,
)
from models.detector.config import ModelConfig
from models.detector.dual_head import DualHead

GENERATORS, OBJECTS = ["nature", "adm", "glide"], ["cat", "dog"]


def detector(backbone, size=32, **options):
    torch.manual_seed(0)
    config = ModelConfig(backbone=backbone, **options)
    return DualHead(config, GENERATORS, OBJECTS, image_size=size).eval()


class Small(nn.Module):
    """Two convolutions; behind the second, gradients differ from place to place."""

    def __init__(self):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6)
        self.layer1 = nn.Conv2d(6, 8, 3, 2, 1)
        statistics = {"running_mean": torch.randn(6) / 10, "running_var": torch.rand(6) + 0.5}
        self.norm1.load_state_dict(statistics, strict=False)  # as after some training

    def forward(self, image):
        # The layer's output is changed in place, as a ReLU may.
        return self.layer1(torch.tanh(self.norm1(self.conv1(image)))).tanh_().mean((2, 3))


class Red(nn.Module):
    """One feature: how red the image is."""

    def __init__(self):
        super().__init__()
        self.conv1, self.layer1 = nn.Conv2d(3, 3, 1, bias=False), nn.Conv2d(3, 1, 1, bias=False)
        self.conv1.weight.data.copy_(torch.eye(3)[:, :, None, None])
        self.layer1.weight.data.copy_(torch.tensor([1.0, 0, 0])[None, :, None, None])

    def forward(self, image):
        return self.layer1(self.conv1(image)).mean((2, 3))


def detector_of(backbone, features):
    """A detector with a backbone of the test's own."""
    model = detector("cifarnet_narrow")
    model.backbone = backbone
    model.generator_head, model.object_head = nn.Linear(features, 3), nn.Linear(features, 2)
    return model.eval()


@pytest.fixture
def small():
    torch.manual_seed(1)
    return detector_of(Small(), 8)


@pytest.fixture
def red():
    """A detector that finds red fake."""
    model = detector_of(Red(), 1)
    model.generator_head.load_state_dict({"weight": torch.tensor([[0.0], [2], [0]]), "bias": torch.zeros(3)})
    return model


@pytest.fixture
def images():
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(2))


def by_hand(model, layer, image, score):
    """Grad-CAM of one image [1, 3, H, W] in PyTorch alone: the map before it is enlarged."""
    start = []

    def cut(module, inputs, output):
        start.append(output.detach().clone().requires_grad_(True))
        return start[0].clone()  # which the network may change in place

    handle = layer.register_forward_hook(cut)
    generator, objects = model(image)
    handle.remove()
    (gradient,) = torch.autograd.grad(score(generator[0], objects[0]), start[0])
    weights = gradient.mean((2, 3), keepdim=True)
    return F.relu((weights * start[0].detach()).sum(1))[0]


def scaled(raw, size):
    large = F.interpolate(raw[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
    return (large / large.max()).numpy()


@pytest.mark.parametrize(
    "score",
    [
        lambda model: verdict_score(True),
        lambda model: verdict_score(False),
        lambda model: generator_score(model, "glide"),
        lambda model: object_score(model, "dog"),
    ],
    ids=["fake", "real", "glide", "dog"],
)
def test_the_map_is_grad_cam_of_the_score_computed_by_hand(small, images, score):
    found = grad_cams(small, images, score(small), batch=2)
    assert found.layer == "layer1" and found.size == (4, 4) and not found.empty.any()
    assert found.heat.shape == (3, 16, 16) and found.heat.dtype == np.float32
    for image, heat in zip(images, found.heat, strict=True):
        raw = by_hand(small, small.backbone.layer1, image[None], score(small))
        assert 0 < (raw > 0).sum() < 16  # a map that could be turned inside out
        np.testing.assert_allclose(heat, scaled(raw, (16, 16)), atol=1e-4)


def test_the_scores_are_the_logits_they_name(small, images):
    with torch.no_grad():
        generator, objects = (logits[0] for logits in small(images))
    assert generator_score(small, "adm")(generator, objects) == generator[1]
    assert object_score(small, "cat")(generator, objects) == objects[0]
    p_fake = generator.double().softmax(0)[1:].sum()
    for fake, p in ((True, p_fake), (False, 1 - p_fake)):
        assert float(verdict_score(fake)(generator, objects)) == pytest.approx(
            float(torch.logit(p)), abs=1e-5
        )


def test_the_map_is_not_turned_inside_out(red):
    image = torch.zeros(1, 3, 8, 8)
    image[0, 0, :4, :4] = 1
    heat = grad_cam(red, image, fake=True)
    assert heat[:4, :4].min() == 1 and heat[4:].max() == 0 and heat[:, 4:].max() == 0


def test_nothing_that_speaks_for_the_class_is_a_map_of_zeros_that_says_so(red):
    image = torch.rand(1, 3, 8, 8)
    found = grad_cams(red, torch.cat([image, -image]), verdict_score(False))
    assert found.empty.tolist() == [True, False]
    assert not found.heat[0].any() and np.isfinite(found.heat).all()
    # Evidence everywhere alike is not evidence nowhere.
    even = grad_cams(red, torch.ones(1, 3, 8, 8), verdict_score(True))
    assert not even.empty[0] and (even.heat == 1).all()
    assert overlay(np.zeros((8, 8, 3), np.uint8), found.heat[0]).shape == (8, 8, 3)


def test_maps_of_a_batch_are_those_of_single_images_each_with_its_own_score(small, images):
    scores = [verdict_score(True), object_score(small, "cat"), generator_score(small, "nature")]
    together = grad_cams(small, images, scores, batch=3).heat
    for image, score, heat in zip(images, scores, together, strict=True):
        np.testing.assert_allclose(grad_cams(small, image[None], score).heat[0], heat, atol=1e-4)
    assert not np.allclose(together[0], grad_cams(small, images[:1], scores[1]).heat[0], atol=1e-2)
    with pytest.raises(ValueError, match="2 scores for 3 images"):
        grad_cams(small, images, scores[:2])


def test_the_model_is_left_as_it_was(small, images):
    small.train()
    small.backbone.conv1.eval()  # modes may be mixed
    small.backbone.requires_grad_(False)
    small.backbone.conv1.requires_grad_(True)
    small.generator_head.weight.grad = torch.ones_like(small.generator_head.weight)
    before = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    modes = [module.training for module in small.modules()]
    wanted = [parameter.requires_grad for parameter in small.parameters()]
    with torch.inference_mode():
        heat = grad_cams(small, images, verdict_score(True)).heat
    with pytest.raises(UserError):
        grad_cams(small, images, verdict_score(True), stage="layer9")
    assert heat.any()
    assert [module.training for module in small.modules()] == modes
    assert [parameter.requires_grad for parameter in small.parameters()] == wanted
    assert all(torch.equal(before[name], tensor) for name, tensor in small.state_dict().items())
    grads = [name for name, parameter in small.named_parameters() if parameter.grad is not None]
    assert grads == ["generator_head.weight"] and (small.generator_head.weight.grad == 1).all()
    assert not any(module._forward_hooks for module in small.modules())
    # Batch norm counted as in evaluation.
    assert np.array_equal(heat, grad_cams(small.eval(), images, verdict_score(True)).heat)


def test_a_chosen_stage_and_the_deepest_one_of_more_than_a_pixel():
    model, image = detector("resnet18", stem="pooled"), torch.rand(1, 3, 32, 32)
    second, third = (grad_cams(model, image, verdict_score(True), stage=f"layer{n}") for n in (2, 3))
    assert (second.layer, second.size, third.size) == ("layer2", (4, 4), (2, 2))
    # Here layer4's map is a single pixel, which could not say where.
    default = grad_cams(model, image, verdict_score(True))
    assert default.layer == "layer3" and np.array_equal(default.heat, third.heat)
    large = grad_cams(model, torch.rand(1, 3, 64, 64), verdict_score(True))
    assert large.layer == "layer4" and large.size == (2, 2)
    for stage, words in (("layer4", "single pixel"), ("layer5", "layer1, layer2, layer3, layer4")):
        with pytest.raises(UserError, match=words) as caught:
            grad_cams(model, image, verdict_score(True), stage=stage)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("backbone", "layer", "size"),
    [
        ("cifarnet_narrow", "block3", (7, 7)),
        ("timm:test_convnext", "stages.3", (2, 2)),
        ("timm:test_efficientnet", "conv_head", (2, 2)),
    ],
)
def test_other_convolutional_backbones(backbone, layer, size):
    model, image = detector(backbone, 64), torch.rand(2, 3, 64, 64)
    found = grad_cams(model, image, generator_score(model, "adm"))
    assert found.layer == layer and found.size == size
    opposite = grad_cams(model, image, lambda generator, objects: -generator[1])
    assert found.heat.any() or opposite.heat.any()


def test_what_cannot_be_mapped_is_one_line(small, images):
    cases = [
        (lambda: generator_score(small, "sora"), "nature, adm, glide"),
        (lambda: object_score(small, "cow"), "cat, dog"),
        (lambda: grad_cams(small, images * torch.nan, verdict_score(True)), "not a finite number"),
    ]
    for call, words in cases:
        with pytest.raises(UserError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_a_transformer_has_no_map():
    model, image = detector("timm:test_vit", 160), torch.zeros(1, 3, 160, 160)
    for call in (lambda: last_convolution(model), lambda: grad_cam(model, image, fake=True)):
        with pytest.raises(UserError, match="convolutional backbone"):
            call()
