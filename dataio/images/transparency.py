"""Which pixels of a picture one can see through, from any of the ways that files say it."""

from typing import Literal, TypeAlias

import numpy as np
from PIL import Image

Transparency: TypeAlias = Literal["drop", "white"]
"""What becomes of a picture that one can see through: its hidden colors count, or a white page behind it."""


def alpha_of(image: Image.Image) -> Image.Image | None:
    """The opacity of an opened image, mode L; None where every pixel is opaque."""
    if not image.has_transparency_data:
        return None
    try:
        alpha = _alpha(image)
    except Exception:  # metadata that name no color of the picture hide none
        return None
    return None if alpha is None or alpha.getextrema()[0] == 255 else alpha


def _alpha(image: Image.Image) -> Image.Image | None:
    hidden = image.info.get("transparency")
    if image.mode.startswith("I"):
        opaque = np.asarray(image) != hidden
        return Image.fromarray(np.where(opaque, 255, 0).astype(np.uint8)) if isinstance(hidden, int) else None
    if image.mode == "RGB" and isinstance(hidden, tuple) and max(hidden) > 255:
        image = image.copy()  # 16 bits per channel in the file, of which Pillow keeps the high 8
        image.info["transparency"] = tuple(value >> 8 for value in hidden)
    if image.mode in ("La", "RGBa"):
        return image.getchannel("a")
    return image.getchannel("A") if image.mode in ("LA", "RGBA") else image.convert("RGBA").getchannel("A")


def on_white(rgb: Image.Image, alpha: Image.Image) -> Image.Image:
    """A picture, RGB, of this opacity, on white."""
    rgba = rgb.convert("RGBA")
    rgba.putalpha(alpha)
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
