"""timm's networks, as `timm:NAME`; timm is imported only for such a name."""

import difflib
from typing import Any

from torch import nn

from models.detector.backbones.registry import BackboneOptions, register_backbone

TIMM = "timm:"


def check_timm(name: str) -> None:
    """Raise a ValueError if timm is not installed or has no such network."""
    try:
        import timm
    except ImportError:
        raise ValueError(f"model.backbone {name}: timm is not installed; pip install timm") from None
    timm_name = name.removeprefix(TIMM)
    if not timm.is_model(timm_name):
        close = difflib.get_close_matches(timm_name.partition(".")[0], timm.list_models(), 3)
        raise ValueError(
            f"model.backbone is {name!r}, which timm {timm.__version__} does not have"
            + (f"; close are {', '.join(TIMM + c for c in close)}" if close else "")
        )


@register_backbone(TIMM, check=check_timm)
def build_timm(options: BackboneOptions) -> tuple[nn.Module, int]:
    """A network of timm's without its classifier, and the number of its features."""
    import timm

    name = options.name.removeprefix(TIMM)
    settings: dict[str, Any] = (
        {"drop_path_rate": options.stochastic_depth} if options.stochastic_depth else {}
    )
    known = timm.get_pretrained_cfg(name)
    if options.image_size is not None and known is not None and known.fixed_input_size:
        settings["img_size"] = options.image_size
    try:
        net = timm.create_model(name, pretrained=False, num_classes=0, **settings)
    except (TypeError, RuntimeError, AssertionError) as error:
        # Not every network has every option, and each reports a missing one by another exception.
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"model.backbone {options.name} cannot be built with {settings}: {reason}") from None
    # The width of the output, which some networks (MobileNetV3) widen behind their last map.
    features: Any = getattr(net, "head_hidden_size", None) or net.num_features
    return net, int(features)
