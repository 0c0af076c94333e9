"""Grad-CAM of a class's score, by pytorch-grad-cam.

Selvaraju et al., "Grad-CAM" (2017): a layer's channels, weighted by the spatial means of
the score's gradients, summed, and clipped at zero. The score is a logit and not the loss, whose
gradient has the opposite sign and would invert the map.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.image import show_cam_on_image
from torch import nn

from dataio.core.errors import UserError
from models.detector.dual_head import DualHead

# One image's generator logits [G] and object logits [O] to the number that is explained.
Score = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

# How ResNets, CifarNet, timm's and torchvision's ConvNeXt name their stages.
_STAGE = re.compile(r"layer\d|block\d|stages\.\d|features\.\d")


@dataclass(frozen=True)
class GradCamMaps:
    """The maps of N images.

    Attributes:
        heat: float32 [N, H, W] in [0, 1], each map divided by its maximum; zero everywhere
            where there is no evidence for the class.
        layer: the layer it was made at, by its name in the backbone.
        size: height and width of that layer's map, pixels.
    """

    heat: NDArray[np.float32]
    layer: str
    size: tuple[int, int]

    @property
    def empty(self) -> NDArray[np.bool_]:
        """Which maps are zero everywhere, bool [N]."""
        return np.logical_not(self.heat.any(axis=(1, 2)), dtype=bool)


def verdict_score(fake: bool) -> Score:
    """The log-odds log P(fake) - log P(real), or its negative for the verdict "real"."""
    sign = 1.0 if fake else -1.0
    return lambda generator, _: sign * (generator[1:].logsumexp(0) - generator[0])


def generator_score(model: DualHead, name: str) -> Score:
    """The generator head's logit of a generator.

    Raises:
        UserError: the detector does not know it.
    """
    index = _index("generator", name, model.generators)
    return lambda generator, _: generator[index]


def object_score(model: DualHead, name: str) -> Score:
    """The object head's logit of an object.

    Raises:
        UserError: the detector does not know it.
    """
    index = _index("object", name, model.objects)
    return lambda _, objects: objects[index]


def _index(kind: str, name: str, names: Sequence[str]) -> int:
    if name not in names:
        known = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "") if names else "none"
        raise UserError(f"Grad-CAM of {kind} {name!r}: the detector does not know it; it knows {known}")
    return list(names).index(name)


def grad_cams(
    model: DualHead,
    images: torch.Tensor,
    scores: Score | Sequence[Score],
    *,
    stage: str = "",
    batch: int = 8,
) -> GradCamMaps:
    """Maps of the evidence for a class.

    The model's mode, running statistics, gradients and `requires_grad` flags are restored.

    Args:
        model: is run in evaluation mode. images: float [N, 3, H, W], normalized.
        scores: what is explained, for all images alike or one for each.
        stage: a stage of the backbone such as "layer3"; empty takes the last one whose map
            is larger than one pixel, or the last such convolution where there are no stages.
        batch: images at a time; limits memory.

    Raises:
        UserError: no such stage, its map is a single pixel, a backbone without
            convolutions (a transformer), or an answer that is not finite.
    """
    chosen = list(scores) if isinstance(scores, Sequence) else [scores] * len(images)
    if len(chosen) != len(images) or not chosen:
        raise ValueError(f"{len(chosen)} scores for {len(images)} images")
    with _untouched(model):
        device = next(model.parameters()).device
        name, size = _choose_layer(model, images[:1].to(device), stage)
        layer = model.backbone.get_submodule(name)
        raw = [
            _raw_maps(model, layer, images[i : i + batch].to(device), chosen[i : i + batch])
            for i in range(0, len(images), batch)
        ]
    height, width = images.shape[2:]
    return GradCamMaps(_scaled(np.concatenate(raw), (height, width)), name, size)


def grad_cam(model: DualHead, image: torch.Tensor, *, fake: bool) -> NDArray[np.float32]:
    """Map of the evidence for the verdict: float32 [H, W] in [0, 1].

    Args:
        image: float [1, 3, H, W], normalized. fake: the verdict. See `grad_cams`.
    """
    return grad_cams(model, image, verdict_score(fake)).heat[0]


def last_convolution(model: DualHead) -> nn.Module:
    """The backbone's last convolution.

    Raises:
        UserError: the backbone has none behind its first layer (a transformer).
    """
    convolutions = [module for module in model.backbone.modules() if isinstance(module, nn.Conv2d)]
    if len(convolutions) < 2:
        raise UserError(
            "Grad-CAM needs a convolutional backbone, this detector's has none; leave out the maps"
        )
    return convolutions[-1]


def overlay(picture: NDArray[np.uint8], heat: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The heat over the picture, uint8 [H, W, 3].

    Args:
        picture: uint8 [H, W, 3]. heat: float32 [H, W] in [0, 1].
    """
    return show_cam_on_image(picture.astype(np.float32) / 255, heat, use_rgb=True)


class _Rows(nn.Module):
    """Both heads' logits, as one pair for each image: what pytorch-grad-cam hands to a target."""

    def __init__(self, model: DualHead) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return list(zip(*self.model(image), strict=True))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Do nothing: pytorch-grad-cam calls it, and a training's gradients must stay."""


class _RawGradCAM(GradCAM):
    """Keeps the map as the paper defines it.

    The library's own scaling subtracts the minimum, which would show evidence
    everywhere as evidence nowhere.
    """

    raw: NDArray[np.float32]

    def get_cam_image(self, *args: Any, **options: Any) -> NDArray[np.float32]:
        cam = super().get_cam_image(*args, **options)
        self.raw = np.maximum(cam, 0).astype(np.float32)
        return cam


def _raw_maps(
    model: DualHead, layer: nn.Module, images: torch.Tensor, scores: Sequence[Score]
) -> NDArray[np.float32]:
    """GradCamMaps at the layer's own size, float32 [N, h, w], at least 0."""
    targets: list[Any] = [lambda row, score=score: score(*row) for score in scores]
    # A copy of each activation: a ReLU behind the layer may work in place.
    cam = _RawGradCAM(_Rows(model), [layer], reshape_transform=torch.clone)
    try:
        # Parameters have no gradient here, so that the graph must start at the image.
        cam(input_tensor=images.detach().clone().requires_grad_(True), targets=targets)
    finally:
        cam.activations_and_grads.release()
    if not np.isfinite(cam.raw).all():
        raise UserError("Grad-CAM: the detector's answer is not a finite number; did its training diverge?")
    return cam.raw


def _scaled(raw: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """Enlarged to `size` and divided by the maximum; zeros stay zeros."""
    heat = F.interpolate(torch.from_numpy(raw)[:, None], size=size, mode="bilinear", align_corners=False)
    maps = heat[:, 0].double().numpy()
    most = maps.max(axis=(1, 2), keepdims=True)
    return (maps / np.where(most > 0, most, 1)).astype(np.float32)


@contextmanager
def _untouched(model: DualHead) -> Iterator[None]:
    """Evaluation mode, gradients for nothing but the image; afterwards all is as before."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval()
        model.requires_grad_(False)
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, requires in flags:
            parameter.requires_grad_(requires)


def _choose_layer(model: DualHead, image: torch.Tensor, stage: str) -> tuple[str, tuple[int, int]]:
    """The layer's name in the backbone, and the height and width of its map of this image."""
    last_convolution(model)
    sizes = _map_sizes(model, image)
    stages = [name for name in sizes if _STAGE.fullmatch(name)]
    if stage:
        if stage not in stages:
            alternatives = f"it has {', '.join(stages)}" if stages else "it has none"
            raise UserError(f"Grad-CAM at stage {stage!r}: the backbone has no such stage; {alternatives}")
        if sizes[stage] == (1, 1):
            pixels = image.shape[-1]
            raise UserError(
                f"Grad-CAM at stage {stage!r}: its map of a {pixels} px image is a single pixel; "
                "choose an earlier stage"
            )
        return stage, sizes[stage]
    for name in (*reversed(stages), *reversed(sizes)):
        if sizes[name] != (1, 1):
            return name, sizes[name]
    raise UserError(f"Grad-CAM: every map of a {image.shape[-1]} px image is a single pixel")


@torch.no_grad()
def _map_sizes(model: DualHead, image: torch.Tensor) -> dict[str, tuple[int, int]]:
    """Height and width of the map of each stage and each convolution, in the order they end."""
    sizes: dict[str, tuple[int, int]] = {}

    def note(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            # Not tokens [N, T, C], nor windows of an image as so many images.
            if isinstance(output, torch.Tensor) and output.dim() == 4 and len(output) == len(image):
                sizes[name] = (output.shape[2], output.shape[3])

        return hook

    handles = [
        module.register_forward_hook(note(name))
        for name, module in model.backbone.named_modules()
        if isinstance(module, nn.Conv2d) or _STAGE.fullmatch(name)
    ]
    try:
        model(image)
    finally:
        for handle in handles:
            handle.remove()
    return sizes
