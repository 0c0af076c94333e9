"""The network: names, stems, the trimmed convolution, the loss, loading weights."""

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from models.detector.backbones.torchvision_nets import TrimmedConv2d
from models.detector.config import ModelConfig
from models.detector.dual_head import DualHead, WeightsError, dual_head_loss, whiten_stem
from models.detector.weights import WeightReport, load_weights

GENERATORS, OBJECTS = ("nature", "adm", "glide"), ("cat", "dog")


def build(generators=GENERATORS, objects=OBJECTS, **config):
    torch.manual_seed(0)
    return DualHead(ModelConfig(backbone="resnet18", **config), generators, objects)


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
def test_backbone_names_are_torchvisions(name):
    ours = DualHead(ModelConfig(backbone=name), GENERATORS, OBJECTS).backbone.state_dict()
    theirs = {k: v for k, v in getattr(torchvision.models, name)().state_dict().items() if "fc." not in k}
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


@pytest.mark.parametrize("stem", ["imagenet", "cifar", "pooled"])
@pytest.mark.parametrize("hidden", [0, 16])
def test_shapes_of_the_logits(stem, hidden):
    generator, object = build(stem=stem, head_hidden=hidden)(torch.randn(2, 3, 32, 32))
    assert generator.shape == (2, 3) and object.shape == (2, 2)


@pytest.mark.parametrize(("size", "stride"), [(1, 1), (1, 2), (2, 2), (2, 1), (5, 1)])
def test_the_trimmed_convolution_equals_the_full_one(size, stride):
    torch.manual_seed(0)
    full = nn.Conv2d(8, 6, 3, stride=stride, padding=1, bias=False)
    trimmed = TrimmedConv2d(8, 6, 3, stride=stride, padding=1, bias=False)
    trimmed.load_state_dict(full.state_dict())
    results = []
    for layer in (full, trimmed):
        image = torch.randn(4, 8, size, size, generator=torch.Generator().manual_seed(1)).requires_grad_()
        output = layer(image)
        (output**2).sum().backward()
        results.append((output.detach(), image.grad, layer.weight.grad))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


def test_unknown_objects_count_for_nothing():
    torch.manual_seed(0)
    generator_logits, object_logits = torch.randn(4, 3), torch.randn(4, 2, requires_grad=True)
    generator = torch.tensor([0, 1, 2, 0])
    _, by_object = dual_head_loss(generator_logits, object_logits, generator, torch.tensor([1, -1, 0, -1]))
    expected = nn.functional.cross_entropy(object_logits[[0, 2]], torch.tensor([1, 0]), reduction="sum")
    torch.testing.assert_close(by_object, expected)
    _, none = dual_head_loss(generator_logits, object_logits, generator, torch.full((4,), -1))
    assert none.item() == 0
    none.backward()
    assert object_logits.grad is not None and object_logits.grad.abs().sum() == 0


def test_whitening_makes_the_stems_outputs_uncorrelated():
    torch.manual_seed(0)
    smooth = nn.functional.avg_pool2d(torch.randn(512, 3, 34, 34), 3, 1) + 0.05 * torch.randn(512, 3, 32, 32)
    model = build(stem="pooled", whiten=True)
    whiten_stem(model, smooth)
    weight = model.backbone.conv1.weight.detach()
    assert torch.equal(weight[27:54], -weight[:27])
    patches = nn.functional.unfold(smooth, 3, stride=3).transpose(1, 2).reshape(-1, 27)
    covariance = torch.cov((patches @ weight[:27].reshape(27, 27).T).T)
    off = covariance - torch.diag(covariance.diag())
    assert off.abs().max() < 0.02 * covariance.diag().max()
    before = torch.cov(patches.T)
    ratio_before = torch.linalg.eigvalsh(before)[[0, -1]]
    assert covariance.diag().max() / covariance.diag().min() < 0.1 * (ratio_before[1] / ratio_before[0])


def test_weights_of_torchvision_and_their_report(tmp_path):
    torch.manual_seed(5)
    source = torchvision.models.resnet18()
    torch.save(source.state_dict(), tmp_path / "resnet18.pth")
    model = build()
    report = load_weights(model, str(tmp_path / "resnet18.pth"), "resnet18")
    assert torch.equal(model.backbone.layer4[1].conv2.weight, source.layer4[1].conv2.weight)
    assert sorted(report.dropped) == ["backbone.fc.bias", "backbone.fc.weight"]
    assert len(report.matched) == len(source.state_dict()) - 2
    assert all("head" in name for name in report.fresh)


def test_heads_of_another_label_space_are_replaced_and_said(tmp_path):
    old = build(objects=("cat", "dog", "frog"))
    labels = {"generators": list(GENERATORS), "objects": ["cat", "dog", "frog"]}
    torch.save({"model": old.state_dict(), "labels": labels}, tmp_path / "best.pt")
    model = build()
    fresh = model.object_head.weight.clone()
    nn.init.zeros_(model.generator_head.weight)
    report = load_weights(model, str(tmp_path / "best.pt"), "resnet18")
    assert torch.equal(model.object_head.weight, fresh)
    assert torch.equal(model.generator_head.weight, old.generator_head.weight)
    assert "cat, dog, frog] (3), ours [cat, dog] (2)" in str(report)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "neither a file nor torchvision weights of resnet18"),
        (b"not weights", "cannot be read as weights"),
        ({"backbone.conv1.weight": torch.zeros(64, 3, 5, 5)}, r"shape \[64, 3, 5, 5\]"),
        ({"conv1.weight": torch.zeros(64, 3, 7, 7)}, "tensors of the backbone are missing"),
    ],
)
def test_unusable_weights_are_named(tmp_path, content, message):
    path = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(WeightsError, match=message):
        load_weights(build(), str(path), "resnet18")


@pytest.mark.parametrize("wrapping", ["plain", "state_dict", "model", "safetensors"])
def test_other_programs_files_load_out_of_their_wrapping(tmp_path, wrapping):
    torch.manual_seed(5)
    source = torchvision.models.resnet18().state_dict()
    prefixed = {f"module.{name}": tensor for name, tensor in source.items()}
    path = tmp_path / "weights.pth"
    if wrapping == "safetensors":
        path = tmp_path / "weights.safetensors"
        save_file(prefixed, path)
    else:
        torch.save(prefixed if wrapping == "plain" else {wrapping: prefixed, "epoch": 3}, path)
    model = build()
    report = load_weights(model, str(path), "resnet18")
    assert torch.equal(model.backbone.state_dict()["conv1.weight"], source["conv1.weight"])
    assert sorted(report.dropped) == ["backbone.fc.bias", "backbone.fc.weight"]
    text = report.to_text()
    assert f"{len(source) - 2} loaded\n" in text and "  backbone.layer4.1.bn2.running_var\n" in text
    assert "2 dropped from the file\n  backbone.fc" in text


def test_timms_files_load_and_its_names_are_not_downloaded_blindly(tmp_path):
    config = ModelConfig(backbone="timm:resnet18")
    model = DualHead(config, GENERATORS, OBJECTS)
    source = timm.create_model("resnet18", pretrained=False).state_dict()
    torch.save(source, tmp_path / "timm.pth")
    report = load_weights(model, str(tmp_path / "timm.pth"), "timm:resnet18")
    assert (
        torch.equal(model.backbone.state_dict()["conv1.weight"], source["conv1.weight"])
        and len(report.dropped) == 2
    )
    with pytest.raises(WeightsError, match="give one, or `pretrained` to download"):
        load_weights(model, "IMAGENET1K_V1", "timm:resnet18")


def test_a_file_without_tensors_is_said():
    with pytest.raises(
        WeightsError, match=r"neither a file nor torchvision weights of cifarnet \(which has none"
    ):
        load_weights(DualHead(ModelConfig(backbone="cifarnet"), GENERATORS, OBJECTS), "V1", "cifarnet")


def test_a_long_report_stays_a_line():
    report = WeightReport(matched=["a"], dropped=[f"block{n}" for n in range(100)])
    assert "block7 and 92 more" in str(report) and "\n" not in str(report)
    assert "  block99\n" in report.to_text()
