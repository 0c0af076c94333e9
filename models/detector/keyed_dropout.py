"""Dropout and stochastic depth drawn from keys instead of torch's generator.

A pass may hold several micro-batches, each with a key of its own. What is dropped is a pure
function of a micro-batch's key, the layer, and the place in the micro-batch: the same in passes
of any size, on any number of processes, after a resume, and in a captured CUDA graph, where a
generator's seed could not change from step to step.
"""

import torch
from torch import nn
from torchvision.ops import StochasticDepth

# SplitMix64's increment and finalizer (Steele, Lea & Flood, OOPSLA 2014), as signed 64-bit numbers.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64


class DropoutKeys:
    """The keys of the pass in hand, which the layers of a model share.

    Attributes:
        keys: int64 [G] on the model's device, one for each micro-batch.
    """

    def __init__(self) -> None:
        self.keys = torch.zeros(1, dtype=torch.int64)


def _shifted(bits: torch.Tensor, count: int) -> torch.Tensor:
    """A logical shift to the right; torch's is arithmetic."""
    return (bits >> count) & ((1 << (64 - count)) - 1)


def keyed_uniform(keys: torch.Tensor, layer: int, count: int) -> torch.Tensor:
    """Uniform numbers in [0, 1), float32 [G, count].

    Args:
        keys: int64 [G]. layer: number of the layer that draws.
    """
    places = torch.arange(1, count + 1, device=keys.device)
    # Two rounds, so that neighboring keys, layers and places share nothing.
    of_layer = ((layer + 1) * _MIX_2 + 2**63) % 2**64 - 2**63  # wrapped to 64 bits, as tensors do
    bits = _finalized((keys + of_layer)[:, None])
    bits = _finalized(bits + places * _GOLDEN)
    return _shifted(bits, 40).float() * 2.0**-24


def _finalized(bits: torch.Tensor) -> torch.Tensor:
    bits = (bits ^ _shifted(bits, 30)) * _MIX_1
    bits = (bits ^ _shifted(bits, 27)) * _MIX_2
    return bits ^ _shifted(bits, 31)


class _Keyed(nn.Module):
    """A layer that draws from the keys of its model's pass; its number tells it from the others."""

    keys: DropoutKeys
    layer: int

    def _mask(self, input: torch.Tensor, p: float, each: int, *, scale: bool = True) -> torch.Tensor:
        """Factors in input's type for `each` draws per image, [N * each]."""
        micro_batches = len(self.keys.keys)
        count = len(input) // micro_batches * each
        kept = (keyed_uniform(self.keys.keys, self.layer, count) >= p).flatten()
        factor = 1 / (1 - p) if scale and p < 1 else 1.0
        return kept.to(input.dtype) * factor


class KeyedDropout(_Keyed, nn.Dropout):
    """nn.Dropout whose zeros follow from keys."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Float [N, ...] to the same shape."""
        if not self.training or self.p == 0:
            return input
        return input * self._mask(input, self.p, input[0].numel()).view(input.shape)


class KeyedStochasticDepth(_Keyed, StochasticDepth):
    """torchvision's StochasticDepth of rows: whole images of a residual branch are dropped."""

    p: float

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Float [N, ...] to the same shape."""
        if not self.training or self.p == 0:
            return input
        return input * self._mask(input, self.p, 1).view(-1, *[1] * (input.ndim - 1))


class KeyedDropPath(_Keyed):
    """timm's DropPath, which is stochastic depth of rows too."""

    drop_prob: float
    scale_by_keep: bool

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Float [N, ...] to the same shape."""
        if not self.training or not self.drop_prob:
            return x
        mask = self._mask(x, self.drop_prob, 1, scale=self.scale_by_keep)
        return x * mask.view(-1, *[1] * (x.ndim - 1))


def use_keyed_dropout(model: nn.Module) -> tuple[DropoutKeys, list[str]]:
    """Let the model's dropout and stochastic depth draw from keys; state-dict names are unchanged.

    Returns:
        the keys that its layers share, and the names of layers that drop in another way.
    """
    shared, others = DropoutKeys(), []
    for number, (name, module) in enumerate(model.named_modules()):
        keyed: type[_Keyed] | None = None
        if type(module) is nn.Dropout:
            keyed = KeyedDropout
        elif type(module) is StochasticDepth and module.mode == "row":
            keyed = KeyedStochasticDepth
        elif type(module).__name__ == "DropPath" and type(module).__module__.startswith("timm."):
            keyed = KeyedDropPath
        elif _drops(module):
            others.append(name)
        # Fused attention takes the probability of this layer and draws by itself.
        if keyed is KeyedDropout and name.rpartition(".")[2] == "attn_drop" and _drops(module):
            keyed = None
            others.append(name)
        if keyed is not None:
            module.__class__ = keyed
            assert isinstance(module, _Keyed)
            module.keys, module.layer = shared, number
    return shared, others


def _drops(module: nn.Module) -> bool:
    """Whether a layer's own probability says that it drops something."""
    kind = type(module).__name__.lower()
    chance = getattr(module, "p", getattr(module, "drop_prob", getattr(module, "prob", 0.0)))
    return "drop" in kind and isinstance(chance, int | float) and chance > 0
