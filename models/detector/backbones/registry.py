"""The registry of backbones: names to functions that build a network without its classifier.

Each file of this package registers its networks when it is imported, and all files are
imported at the first lookup. Importing this module itself costs no PyTorch.
"""

import difflib
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import nn

_COMMON = ("resnet18", "resnet50", "convnext_tiny", "swin_t", "cifarnet", "cifarnet_narrow")


@dataclass(frozen=True)
class BackboneOptions:
    """What a build function receives.

    Args:
        name: the full name that was asked for.
        stem: imagenet, or another of the registered `stems`.
        stochastic_depth: share of the residual branches dropped at the last block, falling
            linearly to 0 at the first (Huang et al., 2016). 0 for networks without any.
        image_size: side of the input, pixels; None if the network need not know.
    """

    name: str
    stem: str = "imagenet"
    stochastic_depth: float = 0.0
    image_size: int | None = None


B = TypeVar("B", bound="Callable[[BackboneOptions], tuple[nn.Module, int]]")


@dataclass(frozen=True)
class Backbone:
    """One entry of the registry; see `register_backbone`."""

    build: "Callable[[BackboneOptions], tuple[nn.Module, int]]"
    stems: tuple[str, ...] = ("imagenet",)
    check: Callable[[str], None] | None = None


BACKBONES: dict[str, Backbone] = {}


def register_backbone(
    *names: str, stems: tuple[str, ...] = ("imagenet",), check: Callable[[str], None] | None = None
) -> Callable[[B], B]:
    """Decorate a function that builds the networks of these names.

    The function returns the network, which maps float [N, 3, H, W] to float [N, features],
    and the number of its features. Its parameters' names become the checkpoint's keys.

    Args:
        names: values of `model.backbone`. A name that ends with a colon is a prefix: it
            stands for all names that begin with it.
        stems: values of `model.stem` that the function can build.
        check: raises a ValueError for a name behind a prefix that does not exist.
    """

    def register(build: B) -> B:
        for name in names:
            if name in BACKBONES:
                raise ValueError(f"backbone {name!r} is registered twice")
            BACKBONES[name] = Backbone(build, stems, check)
        return build

    return register


@cache
def _import_families() -> None:
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        importlib.import_module(f"{__package__}.{module.name}")


def backbone_names() -> list[str]:
    """All names, sorted; prefixes as `timm:NAME`."""
    _import_families()
    return sorted(f"{name}NAME" if name.endswith(":") else name for name in BACKBONES)


def _find(name: str) -> Backbone:
    _import_families()
    prefix, colon, _ = name.partition(":")
    key = prefix + colon
    if key not in BACKBONES:
        exact = [known for known in BACKBONES if not known.endswith(":")]
        close = difflib.get_close_matches(name, exact, 3) or _COMMON
        raise ValueError(f"model.backbone is {name!r}, expected one such as {', '.join(close)}, or timm:NAME")
    return BACKBONES[key]


def check_backbone(name: str, stem: str) -> None:
    """Raise a ValueError, one line for the user, for a name or a stem that cannot be built."""
    backbone = _find(name)
    if stem not in backbone.stems:
        raise ValueError(
            f"model.stem {stem} is for torchvision's resnet backbones, not for {name}; use imagenet"
        )
    if backbone.check is not None:
        backbone.check(name)


def build_backbone(
    name: str, stem: str = "imagenet", *, stochastic_depth: float = 0.0, image_size: int | None = None
) -> "tuple[nn.Module, int]":
    """A network without its classifier, and the number of its features.

    The state-dict names are the library's own (without the classifier's).

    Args:
        name: see `check_backbone`. stem, stochastic_depth, image_size: see `BackboneOptions`.

    Raises:
        ValueError: a name or stem that does not exist, or a timm network without an option
            that is set.
    """
    check_backbone(name, stem)
    return _find(name).build(BackboneOptions(name, stem, stochastic_depth, image_size))
