"""A small convolutional network for images of about 32 px on few cores or one GPU.

The network of Jordan, "94% on CIFAR-10 in 3.29 seconds on a single GPU" (2024): a 2x2 first
convolution meant to be whitened, then three blocks that convolve before they pool (frugal
ones in the first block only), so that the pixels' finest structure, where a generator's
traces are, is seen at full resolution. A ResNet-18 behind any stem that a CPU can afford
pools first.
"""

from torch import Tensor, nn

from models.detector.backbones.registry import BackboneOptions, register_backbone


class CifarBlock(nn.Module):
    """3x3 convolution, pooling by 2, 3x3 convolution, each with batch norm and GELU."""

    def __init__(self, channels_in: int, channels: int, pool_first: bool) -> None:
        super().__init__()
        self.pool_first = pool_first
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.pool, self.activation = nn.MaxPool2d(2), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(self.pool(x)) if self.pool_first else self.pool(self.conv1(x))
        x = self.activation(self.norm1(x))
        return self.activation(self.norm2(self.conv2(x)))


class CifarNet(nn.Module):
    """float [N, 3, H, W] with H and W at least 9 to float [N, widths[-1]].

    Args:
        widths: channels of the blocks.
        frugal: pool before the first convolution of blocks 2 and 3, a quarter of its work.
    """

    def __init__(self, widths: tuple[int, int, int], frugal: bool) -> None:
        super().__init__()
        # 12 directions of a 2x2 patch and their negatives; see whiten_stem.
        self.conv1 = nn.Conv2d(3, 24, 2)
        self.activation = nn.GELU()
        self.block1 = CifarBlock(24, widths[0], False)
        self.block2 = CifarBlock(widths[0], widths[1], frugal)
        self.block3 = CifarBlock(widths[1], widths[2], frugal)
        self.pool, self.features = nn.AdaptiveMaxPool2d(1), widths[2]

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.conv1(x))
        x = self.block3(self.block2(self.block1(x)))
        return self.pool(x).flatten(1)


CIFARNETS = {"cifarnet": ((64, 256, 256), False), "cifarnet_narrow": ((64, 128, 128), True)}


@register_backbone(*CIFARNETS)
def build_cifarnet(options: BackboneOptions) -> tuple[nn.Module, int]:
    """The network of `CIFARNETS`, and the number of its features."""
    net = CifarNet(*CIFARNETS[options.name])
    return net, net.features
