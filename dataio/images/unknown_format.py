"""Why Pillow does not know an image's format, where the first bytes tell."""

import importlib.util
import re

from PIL import Image

_HEIF = re.compile(rb"....ftyp(hei[cxms]|hev[cxms]|mif1|msf1)", re.DOTALL)
_JPEG_XL = (b"\0\0\0\x0cJXL \r\n\x87\n", b"\xff\x0a")

# Pillow has no HEIF of its own; the package's opener is used wherever it is installed.
if importlib.util.find_spec("pillow_heif") is not None:
    importlib.import_module("pillow_heif").register_heif_opener()


def unknown_format(source: bytes) -> str:
    """One line that names the format and what to do, or says that Pillow does not know it.

    Args:
        source: the file's bytes, which Pillow cannot identify.
    """
    if _HEIF.match(source[:32]):
        if "HEIF" in Image.OPEN:
            return "a damaged HEIC image"
        return (
            "HEIC, which Pillow opens only with pillow-heif: pip install pillow-heif, or convert it to JPEG"
        )
    if source.startswith(_JPEG_XL):
        return "JPEG XL, which Pillow cannot open; convert it to PNG or JPEG"
    return "not an image Pillow knows"
