"""Blocks of ResNet and cifarnet whose norms add the residual and apply the activation.

Separate additions and activations read and write every map again: 10 of 53 ms of a ResNet-50 step
on an H200. The modules that a block no longer calls stay in place, so names are unchanged.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from models.detector.backbones.cifarnet import CifarBlock
from models.detector.norms.ghost_modules import Activation, GhostBatchNorm2d, GhostNorm, triton_norms


class FusedBasicBlock(BasicBlock):
    """torchvision's BasicBlock, with ReLU and addition in its norms."""

    def forward(self, x: Tensor, shortcut: Tensor | None = None, split: bool = False) -> Any:
        """Float [N, C, H, W] to float [N, C', H', W']; see `FusedStage` for the arguments."""
        shortcut = x if shortcut is None else shortcut
        out = self.conv2(self.bn1(self.conv1(x)))
        return self.bn2(out, shortcut if self.downsample is None else self.downsample(shortcut), split)


class FusedBottleneck(Bottleneck):
    """torchvision's Bottleneck, with ReLU and addition in its norms."""

    def forward(self, x: Tensor, shortcut: Tensor | None = None, split: bool = False) -> Any:
        """Float [N, C, H, W] to float [N, C', H', W']; see `FusedStage` for the arguments."""
        shortcut = x if shortcut is None else shortcut
        out = self.conv3(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
        return self.bn3(out, shortcut if self.downsample is None else self.downsample(shortcut), split)


class FusedStage(nn.Sequential):
    """Fused blocks in a row: each hands its output to the next one twice.

    A block uses its input for the first convolution and for the shortcut. As two tensors of one
    memory, each has a gradient of its own, and the norm that made them adds the two as it reads
    them. Otherwise PyTorch would read both and write their sum first.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Float [N, C, H, W] to float [N, C', H', W']."""
        x = shortcut = input
        last = len(self) - 1
        for number, block in enumerate(self):
            if number == last:
                return block(x, shortcut)
            x, shortcut = block(x, shortcut, True)
        return x


class FusedResNet(ResNet):
    """torchvision's ResNet, with the stem's ReLU in its norm."""

    def forward(self, x: Tensor) -> Tensor:
        """Float [N, 3, H, W] to float [N, features]."""
        x = self.maxpool(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class FusedMaxPool2d(nn.MaxPool2d):
    """nn.MaxPool2d(3, 2, 1) of channels_last maps by Triton kernels where `GhostNorm.path` allows them."""

    def forward(self, input: Tensor) -> Tensor:
        """Float [N, C, H, W] to float [N, C, (H + 1) // 2, (W + 1) // 2]."""
        wanted = GhostNorm.path == "triton" or (GhostNorm.path == "auto" and input.is_cuda)
        if torch.compiler.is_compiling() or not wanted or input.dim() != 4 or not input.numel():
            return super().forward(input)
        fused = triton_norms()
        if fused is None or input.dtype not in fused.FUSED_DTYPES:
            return super().forward(input)
        if not input.is_contiguous(memory_format=torch.channels_last):
            return super().forward(input)
        from models.detector.norms.fused_pool import fused_max_pool

        return fused_max_pool(input)


def _is_resnets_pooling(module: nn.Module) -> bool:
    if type(module) is not nn.MaxPool2d or module.ceil_mode or module.return_indices:
        return False
    sizes = (module.kernel_size, module.stride, module.padding, module.dilation)
    return all(size in (wanted, (wanted, wanted)) for size, wanted in zip(sizes, (3, 2, 1, 1), strict=True))


class FusedCifarBlock(CifarBlock):
    """cifarnet's block, with GELU in its norms."""

    def forward(self, x: Tensor) -> Tensor:
        """Float [N, C, H, W] to float [N, C', H / 2, W / 2]."""
        x = self.conv1(self.pool(x)) if self.pool_first else self.pool(self.conv1(x))
        return self.norm2(self.conv2(self.norm1(x)))


# The fused class, the module that it no longer calls, and its activation in the norms named.
_FUSED: dict[type[nn.Module], tuple[type[nn.Module], str, type[nn.Module], Activation, tuple[str, ...]]] = {
    BasicBlock: (FusedBasicBlock, "relu", nn.ReLU, "relu", ("bn1", "bn2")),
    Bottleneck: (FusedBottleneck, "relu", nn.ReLU, "relu", ("bn1", "bn2", "bn3")),
    ResNet: (FusedResNet, "relu", nn.ReLU, "relu", ("bn1",)),
    CifarBlock: (FusedCifarBlock, "activation", nn.GELU, "gelu", ("norm1", "norm2")),
}


def use_fused_blocks(model: nn.Module) -> None:
    """Fuse the blocks whose norms are all GhostBatchNorm2d, and ResNet's max pooling; others stay.

    Args:
        model: changed in place; only classes and the norms' `activation` change.
    """
    for module in model.modules():
        if _is_resnets_pooling(module):
            module.__class__ = FusedMaxPool2d
        if type(module) not in _FUSED:
            continue
        fused, unused, kind, activation, names = _FUSED[type(module)]
        norms: list[Any] = [getattr(module, name) for name in names]
        act = module.get_submodule(unused)
        same = type(act) is kind and getattr(act, "approximate", "none") == "none"
        if same and all(type(norm) is GhostBatchNorm2d for norm in norms):
            module.__class__ = fused
            for norm in norms:
                norm.activation = activation
    for module in model.modules():
        blocks = list(module) if type(module) is nn.Sequential else []
        if blocks and all(type(block) in (FusedBasicBlock, FusedBottleneck) for block in blocks):
            module.__class__ = FusedStage
