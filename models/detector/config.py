"""The configuration of the detector's network; imports no PyTorch, so that a parser of it is cheap."""

from dataclasses import dataclass
from typing import Literal

from models.detector.backbones.registry import check_backbone


@dataclass(kw_only=True)
class ModelConfig:
    """The network."""

    backbone: str = "resnet50"
    """torchvision's resnet*, convnext_*, swin_*; cifarnet or cifarnet_narrow for 32 px; or timm:NAME."""
    stem: Literal["imagenet", "cifar", "pooled"] = "imagenet"
    """imagenet: 7x7 stride 2, pooled by 2; cifar: 3x3, no pooling, 16 times the work; pooled: 3x3, pooled by 4."""
    whiten: bool = False
    """Start the first convolution from scratch as a whitening of the training images' patches."""
    freeze_stem: bool = False
    """Leave the first convolution at its start (whitened, or of the weights' file), which saves its backward pass."""
    head_hidden: int = 0
    """Width of each head's hidden layer; 0 makes the heads linear."""
    object_hidden: int = 0
    """Width of the object head's, where it differs; 0 takes head_hidden."""
    head_dropout: float = 0.0
    """Share of a hidden layer's outputs dropped in training."""
    stochastic_depth: float = 0.0
    """Share of the last residual branches dropped in training (ConvNeXt, Swin, timm's)."""
    weights: str = ""
    """Initial weights: a file, or a torchvision name such as IMAGENET1K_V2; empty starts from scratch."""

    def __post_init__(self) -> None:
        if min(self.head_hidden, self.object_hidden) < 0:
            raise ValueError("model.head_hidden and model.object_hidden must be 0 or more")
        if not 0 <= self.head_dropout < 1 or not 0 <= self.stochastic_depth < 1:
            raise ValueError("model.head_dropout and model.stochastic_depth must be in [0, 1)")
        if self.head_dropout and not self.head_hidden + self.object_hidden:
            raise ValueError("model.head_dropout needs a hidden layer; set model.head_hidden")
        # The lookup imports PyTorch; a parser makes the default for its help, which need not wait for it.
        if (self.backbone, self.stem) != (ModelConfig.backbone, ModelConfig.stem):
            check_backbone(self.backbone, self.stem)
