"""Backbones by name: torchvision's ResNet, ConvNeXt and Swin, timm's, and a small one of ours."""

import difflib
import re
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.ops import StochasticDepth

from models.detector.cifarnet import CIFARNETS, CifarNet

TIMM = "timm:"
_FAMILIES = re.compile(r"resnet\d+|wide_resnet\w+|resnext\w+|convnext_\w+|swin_\w+")


def torchvision_names() -> list[str]:
    """Torchvision's networks that can be a backbone here."""
    return [
        name
        for name in torchvision.models.list_models(module=torchvision.models)
        if _FAMILIES.fullmatch(name)
    ]


def check_backbone(name: str, stem: str) -> None:
    """Raise a ValueError, one line for the user, for a name or a stem that cannot be built."""
    resnet = name.startswith("resnet") and name in torchvision_names()
    if stem != "imagenet" and not resnet:
        raise ValueError(
            f"model.stem {stem} is for torchvision's resnet backbones, not for {name}; use imagenet"
        )
    if name in CIFARNETS or name in torchvision_names():
        return
    if not name.startswith(TIMM):
        known = [*torchvision_names(), *CIFARNETS]
        close = difflib.get_close_matches(name, known, 3) or [
            "resnet18",
            "resnet50",
            "convnext_tiny",
            "swin_t",
        ]
        raise ValueError(
            f"model.backbone is {name!r}, expected one of torchvision's such as {', '.join(close)}, "
            f"{' or '.join(CIFARNETS)}, or timm:NAME"
        )
    try:
        import timm
    except ImportError:
        raise ValueError(f"model.backbone {name}: timm is not installed; pip install timm") from None
    wanted = name.removeprefix(TIMM)
    if not timm.is_model(wanted):
        close = difflib.get_close_matches(wanted.partition(".")[0], timm.list_models(), 3)
        raise ValueError(
            f"model.backbone is {name!r}, which timm {timm.__version__} does not have"
            + (f"; close are {', '.join(TIMM + c for c in close)}" if close else "")
        )


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


def build_backbone(
    name: str, stem: str = "imagenet", *, stochastic_depth: float = 0.0, image_size: int | None = None
) -> tuple[nn.Module, int]:
    """A network without its classifier, and the number of its features.

    The state-dict names are the library's own (without the classifier's). The CIFAR stem
    follows He et al., "Deep residual learning for image recognition", section 4.2: 3x3, no
    pooling. The pooled stem sees every pixel at stride 1, where a generator's traces are,
    and then pools by 4, so that the rest costs what it costs behind the ImageNet stem.

    Args:
        name: see `check_backbone`. stem: imagenet, cifar or pooled; the latter for ResNets.
        stochastic_depth: share of the residual branches dropped at the last block, falling
            linearly to 0 at the first (Huang et al., 2016). Drawn from torch's generator.
        image_size: side of the input, pixels; timm's networks of a fixed size need it.

    Raises:
        ValueError: a name or stem that does not exist, or a timm network without an option
            that is set.
    """
    check_backbone(name, stem)
    if name in CIFARNETS:
        small = CifarNet(*CIFARNETS[name])
        return small, small.features
    if name.startswith(TIMM):
        return _build_timm(name.removeprefix(TIMM), stochastic_depth, image_size)
    net: Any = torchvision.models.get_model(name, weights=None)
    if name.startswith("convnext"):
        features, net.classifier[2] = net.classifier[2].in_features, nn.Identity()
    elif name.startswith("swin"):
        features, net.head = net.head.in_features, nn.Identity()
    else:
        features, net.fc = net.fc.in_features, nn.Identity()
    drops = [module for module in net.modules() if isinstance(module, StochasticDepth)]
    for number, module in enumerate(drops):
        module.p = stochastic_depth * number / max(1, len(drops) - 1)
    if stem != "imagenet":
        net.conv1 = nn.Conv2d(3, 64, 3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
        net.maxpool = nn.Identity() if stem == "cifar" else nn.MaxPool2d(4)
    if hasattr(net, "fc"):
        for module in net.modules():
            if type(module) is nn.Conv2d:
                module.__class__ = TrimmedConv2d
    return net, features


def _build_timm(name: str, stochastic_depth: float, image_size: int | None) -> tuple[nn.Module, int]:
    import timm

    options: dict[str, Any] = {"drop_path_rate": stochastic_depth} if stochastic_depth else {}
    known = timm.get_pretrained_cfg(name)
    if image_size is not None and known is not None and known.fixed_input_size:
        options["img_size"] = image_size
    try:
        net = timm.create_model(name, pretrained=False, num_classes=0, **options)
    except (TypeError, RuntimeError, AssertionError) as error:
        # Not every network has every option, and the library says so in its own way.
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"model.backbone {TIMM}{name} cannot be built with {options}: {reason}") from None
    # What the network gives, which some widen behind their last map (MobileNetV3).
    features: Any = getattr(net, "head_hidden_size", None) or net.num_features
    return net, int(features)
