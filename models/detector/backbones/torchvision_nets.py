"""Torchvision's ResNet, ConvNeXt and Swin, with stems for small images."""

import re
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.ops import StochasticDepth

from models.detector.backbones.registry import BackboneOptions, register_backbone

_FAMILIES = re.compile(r"resnet\d+|wide_resnet\w+|resnext\w+|convnext_\w+|swin_\w+")


def torchvision_names() -> list[str]:
    """Torchvision's networks that can be a backbone here."""
    return [
        name
        for name in torchvision.models.list_models(module=torchvision.models)
        if _FAMILIES.fullmatch(name)
    ]


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


_RESNETS = [name for name in torchvision_names() if name.startswith("resnet")]
_OTHERS = [name for name in torchvision_names() if not name.startswith("resnet")]


@register_backbone(*_RESNETS, stems=("imagenet", "cifar", "pooled"))
@register_backbone(*_OTHERS)
def build_torchvision(options: BackboneOptions) -> tuple[nn.Module, int]:
    """A network of torchvision's without its classifier, and the number of its features.

    The CIFAR stem follows He et al., "Deep residual learning for image recognition",
    section 4.2: 3x3, no pooling. The pooled stem sees every pixel at stride 1, where a
    generator's traces are, and then pools by 4, so that the remaining layers cost what they
    cost behind the ImageNet stem.
    """
    net: Any = torchvision.models.get_model(options.name, weights=None)
    if options.name.startswith("convnext"):
        features, net.classifier[2] = net.classifier[2].in_features, nn.Identity()
    elif options.name.startswith("swin"):
        features, net.head = net.head.in_features, nn.Identity()
    else:
        features, net.fc = net.fc.in_features, nn.Identity()
    drops = [module for module in net.modules() if isinstance(module, StochasticDepth)]
    for number, module in enumerate(drops):
        module.p = options.stochastic_depth * number / max(1, len(drops) - 1)
    if options.stem != "imagenet":
        net.conv1 = nn.Conv2d(3, 64, 3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
        net.maxpool = nn.Identity() if options.stem == "cifar" else nn.MaxPool2d(4)
    if hasattr(net, "fc"):
        for module in net.modules():
            if type(module) is nn.Conv2d:
                module.__class__ = TrimmedConv2d
    return net, features
