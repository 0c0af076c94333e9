"""The fused norm on a GPU: its definition, a whole ResNet-50, bits that repeat, CUDA graphs."""

import copy

import pytest
import torch

from models.detector.backbones.registry import build_backbone

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU: run `pytest tests/gpu` on a machine with one", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed: it comes with PyTorch for Linux")

from models.detector.norms import fused_norm
from models.detector.norms.fused_pool import fused_max_pool
from models.detector.norms.ghost_modules import GhostBatchNorm2d, GhostNorm
from models.detector.norms.ghost_norm import set_ghosts, use_ghost_norms
from tests.models.detector.norms.norm_cases import Case, check, fused

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_variant_follows_its_definition(dtype, activation, residual):
    ulps = 2 if residual and activation == "gelu" else 1
    check(Case(3, 5, 64, 31, 21, activation, residual, dtype), "cuda", ulps)


@pytest.mark.parametrize(
    "case",
    [
        Case(1, 64, 64, 112, 112, dtype=torch.bfloat16),
        Case(8, 16, 2048, 7, 7, dtype=torch.bfloat16),
        Case(2, 3, 24, 33, 17, residual=False),
        Case(5, 1, 48, 37, 3, "gelu", False),
        Case(1, 1, 136, 1025, 1),
        Case(2, 9, 256, 20, 33, "none", False, mean=1000.0, std=0.5),
    ],
    ids=str,
)
def test_sizes_and_cancellation(case):
    check(case, "cuda")


def test_bits_repeat():
    case = Case(4, 8, 256, 28, 28, dtype=torch.bfloat16)
    first = fused(case, "cuda")
    for _ in range(3):
        torch.testing.assert_close(fused(case, "cuda"), first, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_max_pooling_is_the_librarys(dtype):
    x = torch.randn(5, 64, 113, 96, device="cuda").relu().to(dtype)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    found, expected = fused_max_pool(x), torch.nn.functional.max_pool2d(x, 3, 2, 1)
    assert torch.equal(found, expected)
    dy = torch.randn_like(found)
    gradients = [torch.autograd.grad(y, x, dy)[0] for y in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=2**-7, atol=2**-7)


def resnet(ghosts):
    torch.manual_seed(0)
    net = build_backbone("resnet50")[0].cuda().to(memory_format=torch.channels_last)
    use_ghost_norms(net)
    set_ghosts(net, ghosts)
    return net


def one_pass(net, images):
    net.zero_grad()
    with torch.autocast("cuda", torch.bfloat16):
        output = net(images)
    output.float().square().mean().backward()
    return output.detach().float(), [p.grad.clone() for p in net.parameters()]


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("ghosts", [1, 4])
def test_a_resnet_in_bf16_is_as_exact_as_with_pytorchs_norms(ghosts, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    images = torch.randn(32, 3, 96, 96, device="cuda").contiguous(memory_format=torch.channels_last)
    net = resnet(ghosts)
    found = one_pass(copy.deepcopy(net), images)
    monkeypatch.setattr(GhostNorm, "path", "plain")
    plain = one_pass(copy.deepcopy(net), images)
    with torch.autocast("cuda", enabled=False):
        exact = copy.deepcopy(net)
        output = exact(images)
        output.square().mean().backward()
    gradients = [p.grad for p in exact.parameters()]
    assert distance(found[0], output) < 1.2 * distance(plain[0], output) + 1e-3
    errors = [
        sum(distance(g, e) for g, e in zip(result[1], gradients, strict=True)) for result in (found, plain)
    ]
    assert errors[0] < 1.2 * errors[1]


def test_the_kernels_are_taken_in_training_and_evaluation(monkeypatch):
    called = []

    def counted(name, real):
        def call(*args, **options):
            called.append(name)
            return real(*args, **options)

        return call

    for name in ("fused_training_norm", "fused_evaluation_norm"):
        monkeypatch.setattr(fused_norm, name, counted(name, getattr(fused_norm, name)))
    net = resnet(1)
    images = torch.randn(4, 3, 64, 64, device="cuda").contiguous(memory_format=torch.channels_last)
    one_pass(net, images)
    assert called == ["fused_training_norm"] * 53
    called.clear()
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
        found = net.eval()(images)
    assert called == ["fused_evaluation_norm"] * 53
    monkeypatch.setattr(GhostNorm, "path", "plain")
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
        assert distance(found.float(), net(images).float()) < 0.02
    assert len(called) == 53


def test_a_captured_pass_equals_the_eager_one():
    net = resnet(2)
    images = torch.randn(8, 3, 64, 64, device="cuda").contiguous(memory_format=torch.channels_last)
    start = copy.deepcopy(net.state_dict())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            one_pass(net, images)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    net.zero_grad()
    with torch.cuda.graph(graph), torch.autocast("cuda", torch.bfloat16):
        output = net(images)
        output.float().square().mean().backward()
    net.load_state_dict(start)
    graph.replay()
    captured = [
        output.clone().float(),
        *(p.grad.clone() for p in net.parameters()),
        *map(torch.clone, net.buffers()),
    ]
    net.load_state_dict(start)
    eager, gradients = one_pass(net, images)
    for found, expected in zip(captured, [eager, *gradients, *net.buffers()], strict=True):
        # cuDNN may add the weights' gradients in another order.
        assert distance(found.float(), expected.float()) < 0.02 or torch.equal(found, expected)
    norms = [m for m in net.modules() if isinstance(m, GhostBatchNorm2d)]
    assert all(norm.num_batches_tracked == 0 for norm in norms)


def test_offsets_beyond_two_billion_values():
    free, _ = torch.cuda.mem_get_info()
    shape = (2, 64, 4097, 4097)  # 2.15e9 values
    if free < 40e9:
        pytest.skip(f"needs 40 GB of free GPU memory, there are {free / 1e9:.0f}")
    torch.cuda.empty_cache()
    norm = GhostBatchNorm2d(64).cuda()
    norm.ghosts, norm.activation = 2, "relu"
    x = torch.empty(shape, device="cuda", dtype=torch.bfloat16, memory_format=torch.channels_last).zero_()
    x[1, :, -1, -1] = 1.0  # the last row of the second ghost batch
    x.requires_grad_()
    y = norm(x)
    assert (y[1, :, -1, -1] > 100).all() and y[0].amax() == 0
    (gradient,) = torch.autograd.grad(y, x, y.detach())
    assert gradient.isfinite().all()
