"""A ResNet with two heads: which generator made the image, and which object it shows.

Real or fake has no head of its own: it is the marginal P(fake) = 1 - P(nature) of the
generator head, so that the two answers can never contradict each other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
import torchvision
from torch import nn


class WeightsError(ValueError):
    """Weights that cannot be found, read or fitted; the message is one line for the user."""


@dataclass(kw_only=True)
class ModelConfig:
    """The network."""

    backbone: Literal["resnet18", "resnet34", "resnet50"] = "resnet50"
    """torchvision's ResNet."""
    stem: Literal["imagenet", "cifar", "pooled"] = "imagenet"
    """imagenet: 7x7 stride 2, pooled by 2; cifar: 3x3, no pooling, 16 times the work; pooled: 3x3, pooled by 4."""
    whiten: bool = False
    """Start the first convolution from scratch as a whitening of the training images' patches."""
    head_hidden: int = 0
    """Width of each head's hidden layer; 0 makes the heads linear."""
    weights: str = ""
    """Initial weights: a file, or a torchvision name such as IMAGENET1K_V2; empty starts from scratch."""

    def __post_init__(self) -> None:
        if self.head_hidden < 0:
            raise ValueError(f"model.head_hidden is {self.head_hidden}, expected 0 or more")


class TrimmedConv2d(nn.Conv2d):
    """A 3x3 convolution that skips the taps which only ever meet zero padding.

    A 32 px image reaches a ResNet's last stage as a single pixel, where 8 of the 9 taps
    multiply padding. Leaving them out gives the same output and the same gradients (theirs
    are zero) for a ninth of the work. Names and shapes of the parameters do not change.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Float [N, C, H, W] to float [N, C', H', W'], as nn.Conv2d."""
        if self.kernel_size == (3, 3) and self.padding == (1, 1) and self.bias is None and self.groups == 1:
            size = tuple(input.shape[-2:])
            if size == (1, 1):
                return F.conv2d(input, self.weight[:, :, 1:2, 1:2])
            if size == (2, 2) and self.stride == (2, 2):
                return F.conv2d(input, self.weight[:, :, 1:, 1:])
        return super().forward(input)


def build_backbone(name: str, stem: str) -> tuple[nn.Module, int]:
    """Torchvision's ResNet without its classifier, and the number of its features.

    The state-dict names are torchvision's (without `fc`). The CIFAR stem follows He et
    al., "Deep residual learning for image recognition", section 4.2: 3x3, no pooling. The
    pooled stem sees every pixel at stride 1, where a generator's traces are, and then
    pools by 4, so that the rest costs what it costs behind the ImageNet stem.
    """
    net = getattr(torchvision.models, name)(weights=None)
    features = net.fc.in_features
    net.fc = nn.Identity()
    if stem != "imagenet":
        net.conv1 = nn.Conv2d(3, 64, 3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
        net.maxpool = nn.Identity() if stem == "cifar" else nn.MaxPool2d(4)
    for module in net.modules():
        if type(module) is nn.Conv2d:
            module.__class__ = TrimmedConv2d
    return net, features


def _head(features: int, hidden: int, classes: int) -> nn.Module:
    if hidden == 0:
        return nn.Linear(features, classes)
    return nn.Sequential(nn.Linear(features, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, classes))


@torch.no_grad()
def whiten_stem(model: "DualHead", images: torch.Tensor) -> None:
    """Set the first convolution to a whitening of the images' patches.

    Rows are the patches' principal directions divided by their standard deviations, then
    their negatives (the ReLU behind cuts one sign), then random mixtures of them for the
    filters left; where there are fewer filters than directions, the weakest directions
    win. Traces of a generator live in the weak, high-frequency directions, which a random
    start hides behind the picture's contrast. After Jordan, "94% on CIFAR-10 in 3.29
    seconds on a single GPU", section 3.2.

    Args:
        model: its backbone's `conv1` is changed in place. images: float [N, 3, H, W],
            normalised as in training; a few thousand are plenty.
    """
    weight: torch.Tensor = model.backbone.conv1.weight  # type: ignore[union-attr, assignment]
    filters, side = weight.shape[0], weight.shape[-1]
    patches = F.unfold(images.float().contiguous(), side, stride=side)
    patches = patches.transpose(1, 2).reshape(-1, 3 * side * side).double()
    patches -= patches.mean(0)
    values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))  # ascending
    # The floor keeps quantisation noise in all but constant directions from exploding.
    rows = (vectors / (values + 5e-4).sqrt()).T
    directions = rows[: min(len(rows), filters)]
    mixtures = torch.Generator().manual_seed(0)
    parts = [directions, -directions][: max(1, min(2, filters // len(directions)))]
    left = filters - sum(map(len, parts))
    parts.append(
        torch.randn(left, len(rows), generator=mixtures, dtype=torch.float64) @ rows / len(rows) ** 0.5
    )
    weight.copy_(torch.cat(parts).reshape(weight.shape))


class DualHead(nn.Module):
    """Backbone, generator head and object head.

    Args:
        config: the architecture; `config.weights` is not loaded here (see `load_weights`).
        generators, objects: label spaces; index 0 of `generators` is "nature".
    """

    def __init__(self, config: ModelConfig, generators: Sequence[str], objects: Sequence[str]) -> None:
        super().__init__()
        self.generators, self.objects = tuple(generators), tuple(objects)
        self.backbone, features = build_backbone(config.backbone, config.stem)
        self.generator_head = _head(features, config.head_hidden, len(self.generators))
        # A head of no classes would have no gradient; one dummy class keeps the shapes.
        self.object_head = _head(features, config.head_hidden, max(1, len(self.objects)))

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of both heads.

        Args:
            image: float [N, 3, H, W], normalised.

        Returns:
            generator logits float [N, generators], object logits float [N, max(1, objects)].
        """
        features = self.backbone(image)
        return self.generator_head(features), self.object_head(features)


def dual_head_loss(
    generator_logits: torch.Tensor,
    object_logits: torch.Tensor,
    generator: torch.Tensor,
    object: torch.Tensor,
    *,
    label_smoothing: float = 0.0,
    generator_weights: torch.Tensor | None = None,
    own_share: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed cross-entropies of both heads, to be divided by the global counts of labels.

    Args:
        generator_logits, object_logits: float [N, classes]; computed on in float32.
        generator: int64 [N]. object: int64 [N], -1 where unknown (contributes nothing).
        label_smoothing: in [0, 1); Szegedy et al., "Rethinking the inception architecture".
        generator_weights: float32 [classes] of the generator head's classes; None for 1 each.
        own_share: of each image's own label; the rest is the label of the image before it
            (`roll(1)`), as `engines.mixing.mix` blends them. The sum of the shares of known
            labels is their count all the same.

    Returns:
        two float32 scalars: the generator head's sum and the object head's sum.
    """

    def cross_entropies(generator: torch.Tensor, object: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        by_generator = F.cross_entropy(
            generator_logits.float(),
            generator,
            weight=generator_weights,
            reduction="sum",
            label_smoothing=label_smoothing,
        )
        by_object = F.cross_entropy(
            object_logits.float(), object, reduction="sum", ignore_index=-1, label_smoothing=label_smoothing
        )
        return by_generator, by_object

    own = cross_entropies(generator, object)
    if own_share == 1:
        return own
    others = cross_entropies(generator.roll(1), object.roll(1))
    return torch.lerp(others[0], own[0], own_share), torch.lerp(others[1], own[1], own_share)
