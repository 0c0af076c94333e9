"""Ghost batch norm: one pass over several ghost batches is as many passes over one, in every backbone."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from engines.attribution.gradcam import grad_cams, verdict_score
from models.detector.backbones.registry import build_backbone
from models.detector.config import ModelConfig
from models.detector.dual_head import DualHead
from models.detector.flops import training_flops
from models.detector.norms.fused_blocks import FusedMaxPool2d, FusedStage
from models.detector.norms.ghost_modules import GhostBatchNorm1d, GhostBatchNorm2d, GhostNorm, triton_norms
from models.detector.norms.ghost_norm import set_ghosts, use_ghost_norms

# Sides of the image: the smallest at which no map of two images is a single pixel, which would be chaotic.
BACKBONES = {
    "resnet18": 48,
    "resnet50": 48,
    "cifarnet": 32,
    "timm:resnet10t": 48,
    "timm:regnetx_002": 48,
    "timm:mobilenetv3_small_100": 48,
    "timm:levit_128s": 224,
}


def network(name, dtype=torch.float64):
    torch.manual_seed(1)
    net = build_backbone(name, image_size=224 if "vit" in name else 32)[0]
    for module in net.modules():  # so that wrong scales, shifts and residuals show
        if isinstance(module, _BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.get_buffer("running_mean"))
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return net.to(dtype).train()


def statistics(net):
    return {n: b for n, b in net.named_buffers() if n.endswith(("running_mean", "running_var"))}


def gradients(net):
    return {n: p.grad for n, p in net.named_parameters()}


OTHERS = (
    "resnext50_32x4d",
    "convnext_tiny",
    "swin_t",
    "timm:efficientnet_b0",
    "timm:densenet121",
    "timm:vit_tiny_patch16_224",
    "timm:inception_v3",
    "timm:repvgg_a0",
    "timm:fastvit_t8",
    "timm:ghostnet_100",
)


@pytest.mark.parametrize("name", [*BACKBONES, *OTHERS])
def test_every_batch_norm_is_replaced_and_names_stay(name):
    net = build_backbone(name)[0]
    keys = list(net.state_dict())
    assert use_ghost_norms(net) == []
    assert [
        n for n, m in net.named_modules() if isinstance(m, _BatchNorm) and not isinstance(m, GhostNorm)
    ] == []
    assert list(net.state_dict()) == keys


@pytest.mark.parametrize("name", BACKBONES)
def test_a_pass_over_ghost_batches_is_a_pass_over_each(name):
    images = torch.randn(6, 3, BACKBONES[name], BACKBONES[name], dtype=torch.float64)
    one, several = network(name), network(name)
    assert use_ghost_norms(several) == []
    start = {n: b.clone() for n, b in statistics(one).items()}
    total: dict[str, torch.Tensor] = {}
    outputs = []
    for part in images.chunk(3):
        one.load_state_dict(start, strict=False)
        outputs.append(one(part))
        outputs[-1].square().sum().backward()
        for n, b in statistics(one).items():
            total[n] = total.get(n, 0) + b / 3
    set_ghosts(several, 3)
    output = several(images)
    output.square().sum().backward()
    torch.testing.assert_close(output, torch.cat(outputs), rtol=1e-9, atol=1e-9)
    expected = gradients(one)
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    for n, gradient in gradients(several).items():
        torch.testing.assert_close(gradient, expected[n], rtol=1e-7, atol=1e-9 * largest)
    for n, b in statistics(several).items():
        torch.testing.assert_close(b, total[n], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "cifarnet", "timm:resnet10t"])
@pytest.mark.parametrize("training", [True, False])
def test_one_ghost_batch_has_the_librarys_bits(name, training):
    theirs, ours = network(name, torch.float32).train(training), network(name, torch.float32).train(training)
    use_ghost_norms(ours)
    images = torch.randn(4, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    results = []
    for net in (theirs, ours):
        pixels = images.clone().requires_grad_()
        output = net(pixels)
        output.square().sum().backward()
        results.append((output, pixels.grad, gradients(net), statistics(net)))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


def test_fused_blocks_call_no_activation_of_their_own():
    net = network("resnet50")
    use_ghost_norms(net)
    called = []
    for name, module in net.named_modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_hook(lambda *_, name=name: called.append(name))
    net(torch.randn(2, 3, 32, 32, dtype=torch.float64))
    assert called == []
    assert all(type(stage) is FusedStage for stage in (net.layer1, net.layer2, net.layer3, net.layer4))
    kinds = [m.activation for m in net.modules() if isinstance(m, GhostNorm)]
    assert (kinds.count("relu"), kinds.count("none")) == (49, 4)  # the four are on shortcuts


def test_only_pooling_like_resnets_is_replaced():
    kinds = [nn.MaxPool2d(3, 2, 1), nn.MaxPool2d((3, 3), (2, 2), (1, 1)), nn.MaxPool2d(2), nn.MaxPool2d(3, 2)]
    kinds += [nn.MaxPool2d(3, 2, 1, ceil_mode=True), nn.MaxPool2d(3, 2, 1, return_indices=True)]
    net = nn.ModuleList(kinds)
    use_ghost_norms(net)
    assert [type(m) is FusedMaxPool2d for m in net] == [True, True, False, False, False, False]


def test_replacing_twice_changes_nothing():
    net = network("resnet18")
    use_ghost_norms(net)
    kinds = [type(module) for module in net.modules()]
    assert use_ghost_norms(net) == [] and [type(module) for module in net.modules()] == kinds
    assert type(copy.deepcopy(net).bn1) is GhostBatchNorm2d


def test_what_cannot_be_replaced_is_named():
    class Own(nn.BatchNorm2d):
        pass

    from timm.layers.evo_norm import EvoNorm2dB0
    from timm.layers.split_batchnorm import SplitBatchNorm2d
    from torchvision.ops import FrozenBatchNorm2d

    net = nn.ModuleDict(
        {
            "fine": nn.BatchNorm2d(4, track_running_stats=False),
            "bare": nn.BatchNorm2d(4, affine=False),
            "frozen": FrozenBatchNorm2d(4),
            "own": Own(4),
            "sync": nn.SyncBatchNorm(4),
            "cumulative": nn.BatchNorm2d(4, momentum=None),
            "evo": EvoNorm2dB0(4),
            "split": SplitBatchNorm2d(4),
        }
    )
    assert use_ghost_norms(net) == ["own", "sync", "cumulative", "evo", "split"]
    assert type(net["fine"]) is type(net["bare"]) is GhostBatchNorm2d and type(net["own"]) is Own


@pytest.mark.parametrize(
    "options", [{}, {"affine": False}, {"track_running_stats": False}, {"momentum": 1.0}]
)
def test_a_norm_of_features_follows_its_definition(options):
    norm = GhostBatchNorm1d(5, **options).double()
    norm.ghosts = 3
    features = torch.randn(12, 5, dtype=torch.float64)
    parts = features.view(3, 4, 5)
    expected = (parts - parts.mean(1, keepdim=True)) / (
        parts.var(1, correction=0, keepdim=True) + norm.eps
    ).sqrt()
    torch.testing.assert_close(norm(features), expected.flatten(0, 1))
    if norm.track_running_stats:
        momentum = options.get("momentum", 0.1)
        torch.testing.assert_close(norm.running_mean, momentum * parts.mean(1).mean(0))
        torch.testing.assert_close(norm.running_var, 1 - momentum + momentum * parts.var(1).mean(0))


@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
@pytest.mark.parametrize("with_residual", [False, True])
def test_activation_and_residual(activation, with_residual):
    norm = GhostBatchNorm2d(3)
    norm.activation = activation
    x, residual = torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2)
    act = {"none": nn.Identity(), "relu": nn.ReLU(), "gelu": nn.GELU()}[activation]
    for _ in range(2):
        z = copy.deepcopy(norm)._normalize(x)
        expected = act(z + residual) if with_residual else act(z)
        torch.testing.assert_close(norm(x, residual if with_residual else None), expected, rtol=0, atol=0)
        norm.eval()


def test_a_network_compiles_as_one_graph():
    net = nn.Sequential(nn.MaxPool2d(3, 2, 1), network("cifarnet"))
    use_ghost_norms(net)
    set_ghosts(net, 2)
    compiled = torch.compile(copy.deepcopy(net), backend="aot_eager", fullgraph=True)
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(compiled(images), net(images), rtol=1e-9, atol=1e-9)


def test_explanations_stay_the_same():
    model = DualHead(ModelConfig(backbone="resnet18"), ("nature", "adm"), ("cat",))
    images = torch.randn(2, 3, 64, 64)
    before = grad_cams(model, images, verdict_score(True), stage="layer3")
    use_ghost_norms(model)
    after = grad_cams(model, images, verdict_score(True), stage="layer3")
    assert before.heat.any() and (before.heat == after.heat).all()


def test_compiled_formula_is_the_loops():
    loop, at_once = GhostBatchNorm2d(6), GhostBatchNorm2d(6)
    loop.ghosts = at_once.ghosts = 2
    x = torch.randn(8, 6, 3, 3) * 3 + 5
    found = at_once._at_once(x, at_once.running_mean, at_once.running_var, 0.1)
    torch.testing.assert_close(found, loop(x))
    torch.testing.assert_close(at_once.state_dict(), loop.state_dict())


def test_mistakes():
    norm = GhostBatchNorm2d(3)
    with pytest.raises(ValueError, match="ghosts is 0"):
        set_ghosts(norm, 0)
    set_ghosts(norm, 4)
    with pytest.raises(ValueError, match="6 images cannot be parted into 4 ghost batches"):
        norm(torch.randn(6, 3, 2, 2))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        norm(torch.randn(4, 3, 1, 1))
    assert norm.eval()(torch.randn(6, 3, 2, 2)).shape == (6, 3, 2, 2)  # statistics of its own need no parts


def test_kernels_that_do_not_run_are_left_with_a_warning(monkeypatch):
    fused_norm = pytest.importorskip("models.detector.norms.fused_norm", reason="Triton is not installed")

    def no_compiler():
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(fused_norm, "try_kernels", no_compiler)
    triton_norms.cache_clear()
    norm = GhostBatchNorm2d(4)
    x = torch.randn(2, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    expected = norm(x)
    norm.path = "triton"
    try:
        with pytest.warns(UserWarning, match=r"kernels do not run here \(Failed to find C compiler\)"):
            assert torch.equal(norm(x), expected)
    finally:
        triton_norms.cache_clear()


def test_arithmetic_is_counted_as_before():
    model = DualHead(ModelConfig(backbone="resnet18"), ("nature", "adm"), ("cat",))
    before = training_flops(model, 32)
    use_ghost_norms(model)
    set_ghosts(model, 4)
    assert training_flops(model, 32) == before
