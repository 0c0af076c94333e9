"""Backbones by name: shapes, gradients, names of tensors, clear errors; FLOPs."""

import builtins

import pytest
import timm
import torch
import torchvision

from models.detector.backbones.registry import build_backbone
from models.detector.backbones.torchvision_nets import torchvision_names
from models.detector.config import ModelConfig
from models.detector.dual_head import DualHead, probe_size, whiten_stem
from models.detector.flops import peak_flops, training_flops

GENERATORS, OBJECTS = ("nature", "adm", "glide"), ("cat", "dog")


def build(backbone, size=32, **config):
    torch.manual_seed(0)
    return DualHead(ModelConfig(backbone=backbone, **config), GENERATORS, OBJECTS, image_size=size)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("resnet18", 32),
        pytest.param("resnext50_32x4d", 32, marks=pytest.mark.slow),
        ("convnext_tiny", 32),
        pytest.param("swin_t", 32, marks=pytest.mark.slow),
        pytest.param("swin_v2_t", 32, marks=pytest.mark.slow),
        ("cifarnet", 32),
        ("cifarnet_narrow", 20),
        ("timm:resnet18", 32),
        ("timm:vit_tiny_patch16_224", 32),
        pytest.param("timm:convnext_atto", 32, marks=pytest.mark.slow),
        ("timm:mobilenetv3_small_050", 32),
    ],
)
def test_every_family_gives_two_heads_and_gradients_everywhere(name, size):
    model = build(name, size)
    probe_size(model, size)
    generator, object = model(torch.randn(2, 3, size, size))
    assert generator.shape == (2, 3) and object.shape == (2, 2)
    (generator.square().sum() + object.square().sum()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("name", ["convnext_tiny", "swin_t", "resnet34"])
def test_torchvisions_tensor_names_are_kept(name):
    theirs = torchvision.models.get_model(name).state_dict()
    ours = build_backbone(name)[0].state_dict()
    assert set(theirs) - set(ours) == {n for n in theirs if n.startswith(("fc.", "head.", "classifier.2."))}
    assert not set(ours) - set(theirs)


def test_timms_tensor_names_are_kept():
    ours = build_backbone("timm:resnet18")[0].state_dict()
    assert set(timm.create_model("resnet18", pretrained=False).state_dict()) - set(ours) == {
        "fc.weight",
        "fc.bias",
    }


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"backbone": "resnet19"},
            "model.backbone is 'resnet19', expected one such as resnet18",
        ),
        ({"backbone": "alexnet"}, "model.backbone is 'alexnet', expected one such as resnet18, resnet50"),
        ({"backbone": "timm:resnet19"}, "which timm .* does not have; close are timm:resnet1"),
        ({"backbone": "swin_t", "stem": "cifar"}, "model.stem cifar is for torchvision's resnet backbones"),
        ({"head_dropout": 0.5}, "model.head_dropout needs a hidden layer"),
        ({"head_dropout": 1.0, "head_hidden": 3}, r"must be in \[0, 1\)"),
    ],
)
def test_mistakes_name_the_key_and_what_is_close(config, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**config)


def test_without_timm_its_names_say_how_to_get_it(monkeypatch):
    real_import = builtins.__import__

    def without_timm(name, *args, **kwargs):
        if name == "timm":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_timm)
    with pytest.raises(ValueError, match="timm is not installed; pip install timm"):
        ModelConfig(backbone="timm:resnet18")


def test_a_network_that_refuses_the_size_or_the_option_says_so():
    model = build("timm:vit_tiny_patch16_224", 32)
    with pytest.raises(ValueError, match=r"data\.size 48: the backbone takes no images of this size"):
        probe_size(model, 48)
    with pytest.raises(ValueError, match=r"timm:vgg11 cannot be built with .*drop_path_rate"):
        build("timm:vgg11", stochastic_depth=0.1)
    with pytest.raises(ValueError, match=r"model\.whiten needs a backbone whose first layer"):
        whiten_stem(build("swin_t"), torch.randn(4, 3, 32, 32))


def test_the_small_networks_stem_is_whitened_without_a_bias():
    model = build("cifarnet_narrow")
    whiten_stem(model, torch.rand(64, 3, 32, 32))
    weight = model.backbone.conv1.weight.detach()
    assert torch.equal(weight[12:], -weight[:12]) and not model.backbone.conv1.bias.any()


def test_hidden_layers_differ_between_heads_and_drop_in_training_only():
    model = build("resnet18", head_hidden=64, object_hidden=128, head_dropout=0.5)
    assert [m.out_features for m in model.generator_head if hasattr(m, "out_features")] == [64, 3]
    assert [m.out_features for m in model.object_head if hasattr(m, "out_features")] == [128, 2]
    image = torch.randn(2, 3, 32, 32)
    model.train().backbone.eval()
    torch.manual_seed(3)
    first = model(image)[1]
    assert not torch.equal(first, model(image)[1])
    torch.manual_seed(3)  # all its randomness is torch's own, which the trainer seeds
    assert torch.equal(first, model(image)[1])
    model.eval()
    assert torch.equal(model(image)[1], model(image)[1])


@pytest.mark.parametrize("name", [pytest.param("swin_t", marks=pytest.mark.slow), "timm:convnext_atto"])
def test_stochastic_depth_is_off_by_default_and_drops_where_set(name):
    image = torch.randn(2, 3, 32, 32)
    still, dropping = build(name).train(), build(name, stochastic_depth=0.8).train()
    with torch.no_grad():
        for model in (still, dropping):
            for parameter in model.parameters():
                parameter.add_(0.02)  # ConvNeXt's branches start near zero
        assert torch.equal(still(image)[0], still(image)[0])
        assert not torch.equal(dropping(image)[0], dropping(image)[0])


def test_flops_of_resnet50_are_the_published_ones():
    # 24.30 GFLOP at 224 px with the classifier; the heads here are smaller.
    torch.manual_seed(0)
    model = DualHead(ModelConfig(), list("abcdefghi"), [str(i) for i in range(991)])
    assert training_flops(model, 224) == pytest.approx(24.30e9, rel=1e-3)


def test_counting_flops_leaves_no_trace():
    model = build("resnet18", head_hidden=8, head_dropout=0.5).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    assert training_flops(model, 32) > 1e8
    assert torch.equal(state, torch.get_rng_state()) and model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_peaks_by_the_names_cuda_gives():
    assert peak_flops("NVIDIA H200", "bf16") == 989.5e12
    assert peak_flops("NVIDIA H100 PCIe", "fp16") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", "fp32") == 19.5e12
    assert peak_flops("Tesla T4", "bf16") is None and peak_flops("Some CPU", "fp32") is None


def test_the_names_are_torchvisions():
    assert {"resnet18", "resnet152", "convnext_base", "swin_v2_b"} <= set(torchvision_names())


@pytest.mark.parametrize("name", ["resnet18", "timm:resnet18", "timm:mobilenetv3_small_050"])
def test_one_image_at_a_time_needs_maps_of_several_pixels(name):
    model = build(name, 32)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"^train\.micro_batch is 1, and for data\.size 32 a map .* single pixel"
    ):
        probe_size(model, 32, 1)
    probe_size(model, 32, 2)
    assert model.training and all(
        torch.equal(before[key], value) for key, value in model.state_dict().items()
    )


@pytest.mark.parametrize(("name", "size"), [("resnet18", 64), ("cifarnet_narrow", 20), ("convnext_tiny", 32)])
def test_one_image_at_a_time_is_enough_for_larger_maps_and_other_norms(name, size):
    probe_size(build(name, size), size, 1)
