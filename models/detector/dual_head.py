"""A backbone with two heads: which generator made the image, and which object it shows.

Real or fake has no head of its own: it is the marginal P(fake) = 1 - P(nature) of the
generator head, so that the two answers can never contradict each other.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from models.detector.backbones.registry import build_backbone
from models.detector.config import ModelConfig


class WeightsError(ValueError):
    """Weights that cannot be found, read or fitted; the message is one line for the user."""


def _head(features: int, hidden: int, classes: int, dropout: float) -> nn.Module:
    if hidden == 0:
        return nn.Linear(features, classes)
    layers: list[nn.Module] = [nn.Linear(features, hidden), nn.ReLU(inplace=True)]
    if dropout:
        layers.append(nn.Dropout(dropout))
    return nn.Sequential(*layers, nn.Linear(hidden, classes))


def stem_of(model: "DualHead", key: str) -> nn.Conv2d:
    """The backbone's first convolution; a ValueError that names `key` where it has none."""
    conv = getattr(model.backbone, "conv1", None)
    if not isinstance(conv, nn.Conv2d) or conv.in_channels != 3 or conv.groups != 1:
        raise ValueError(f"{key} needs a backbone whose first layer is one convolution, such as a ResNet")
    return conv


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
        model: its backbone's `conv1` is changed in place; a bias is set to zero. images: float [N, 3, H, W],
            normalized as in training; a few thousand are plenty.

    Raises:
        ValueError: the backbone has no such convolution of RGB.
    """
    conv = stem_of(model, "model.whiten")
    weight = conv.weight
    if conv.bias is not None:
        conv.bias.zero_()
    filters, side = weight.shape[0], weight.shape[-1]
    patches = F.unfold(images.float().contiguous(), side, stride=side)
    patches = patches.transpose(1, 2).reshape(-1, 3 * side * side).double()
    patches -= patches.mean(0)
    values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))  # ascending
    # The floor bounds the gain of nearly constant directions, which hold quantization noise only.
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
        image_size: side of the input, pixels; only some of timm's networks need it.

    Raises:
        ValueError: see `build_backbone`; one line for the user.
    """

    def __init__(
        self,
        config: ModelConfig,
        generators: Sequence[str],
        objects: Sequence[str],
        *,
        image_size: int | None = None,
    ) -> None:
        super().__init__()
        self.generators, self.objects = tuple(generators), tuple(objects)
        self.backbone, features = build_backbone(
            config.backbone, config.stem, stochastic_depth=config.stochastic_depth, image_size=image_size
        )
        hidden, dropout = config.head_hidden, config.head_dropout
        self.generator_head = _head(features, hidden, len(self.generators), dropout)
        self._freeze_stem = config.freeze_stem
        self.freeze_backbone(False)
        # A head without classes would have no gradient; one dummy class keeps the shapes.
        classes = max(1, len(self.objects))
        self.object_head = _head(features, config.object_hidden or hidden, classes, dropout)

    def freeze_backbone(self, frozen: bool) -> None:
        """Take the backbone's gradients away, or give back those that `config.freeze_stem` leaves."""
        self.backbone.requires_grad_(not frozen)
        if self._freeze_stem:
            stem_of(self, "model.freeze_stem").requires_grad_(False)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of both heads.

        Args:
            image: float [N, 3, H, W], normalized.

        Returns:
            generator logits float [N, generators], object logits float [N, max(1, objects)].
        """
        features = self.backbone(image)
        return self.generator_head(features), self.object_head(features)


@torch.no_grad()
def probe_size(model: DualHead, size: int, micro_batch: int = 2) -> None:
    """Raise a ValueError if the backbone cannot be trained on images of `size` pixels.

    Some of the libraries' networks are made for one size, or for multiples of a number. And
    batch norm has nothing to normalize where a micro-batch of one image meets a map of one pixel.

    Args:
        model: on the CPU; its buffers and modes are as before afterwards.
        micro_batch: images that the backbone sees at a time in training.
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        with torch.random.fork_rng(devices=[]):
            model.eval()(torch.zeros(1, 3, size, size))
            model.train()(torch.zeros(min(micro_batch, 2), 3, size, size))
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        if "more than 1 value per channel" in reason:
            raise ValueError(
                f"train.micro_batch is {micro_batch}, and for data.size {size} a map of the backbone has a single "
                "pixel: batch norm needs several values; expected a train.micro_batch of 2 or more, or a larger "
                "data.size"
            ) from None
        raise ValueError(f"data.size {size}: the backbone takes no images of this size ({reason})") from None
    finally:
        for module, training in modes:
            module.training = training
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])


@dataclass(frozen=True)
class LabelMixture:
    """The labels that are mixed into a batch's own, as `engines.train.mixup` mixes its images.

    Attributes:
        before: int64 [N], the image in the batch whose labels are mixed in.
        own_share: float32 [N], of the image's own label; the rest is the other's.
    """

    before: torch.Tensor
    own_share: torch.Tensor


def dual_head_loss(
    generator_logits: torch.Tensor,
    object_logits: torch.Tensor,
    generator: torch.Tensor,
    object_label: torch.Tensor,
    *,
    label_smoothing: float = 0.0,
    generator_weights: torch.Tensor | None = None,
    mixture: LabelMixture | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed cross-entropies of both heads, to be divided by the global counts of labels.

    Args:
        generator_logits, object_logits: float [N, classes]; computed on in float32.
        generator: int64 [N]. object_label: int64 [N], -1 where unknown (contributes nothing).
        label_smoothing: in [0, 1); Szegedy et al., "Rethinking the inception architecture".
        generator_weights: float32 [classes] of the generator head's classes; None for 1 each.
        mixture: the labels mixed in; None for none. The sum of the shares of known labels is their
            count all the same, where each image is mixed into one other of the same share.

    Returns:
        two float32 scalars: the generator head's sum and the object head's sum.
    """

    def cross_entropies(
        generator: torch.Tensor, object_label: torch.Tensor, reduction: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        generator_loss = F.cross_entropy(
            generator_logits.float(),
            generator,
            weight=generator_weights,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )
        object_loss = F.cross_entropy(
            object_logits.float(),
            object_label,
            reduction=reduction,
            ignore_index=-1,
            label_smoothing=label_smoothing,
        )
        return generator_loss, object_loss

    if mixture is None:
        return cross_entropies(generator, object_label, "sum")
    own = cross_entropies(generator, object_label, "none")
    others = cross_entropies(generator[mixture.before], object_label[mixture.before], "none")
    by_generator, by_object = (
        torch.lerp(other, loss, mixture.own_share).sum() for other, loss in zip(others, own, strict=True)
    )
    return by_generator, by_object
