"""What image files say of their origin, written by Pillow and read back."""

import importlib.util
import io
from typing import Any

import pytest
from PIL import Image

from dataio.sources.provenance import read_credentials

VALUE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
ATTRIBUTE = f'<rdf:Description Iptc4xmpExt:DigitalSourceType="{VALUE}"/>'
ELEMENT = f"<Iptc4xmpExt:DigitalSourceType>{VALUE}</Iptc4xmpExt:DigitalSourceType>"
RESOURCE = f'<Iptc4xmpExt:DigitalSourceType rdf:resource="{VALUE}"/>'


def _file(kind: str, xmp: str | None) -> bytes:
    buffer = io.BytesIO()
    options: dict[str, Any] = {}
    packet = f'<x:xmpmeta xmlns:x="adobe:ns:meta/">{xmp}</x:xmpmeta>'.encode()
    if xmp is not None and kind == "PNG":
        from PIL.PngImagePlugin import PngInfo

        options["pnginfo"] = PngInfo()
        options["pnginfo"].add_itxt("XML:com.adobe.xmp", packet.decode())
    elif xmp is not None:
        options["xmp"] = packet
    Image.new("RGB", (8, 8)).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("xmp", [ATTRIBUTE, ELEMENT, RESOURCE])
def test_the_digital_source_type_is_read_from_xmp(kind, xmp):
    assert read_credentials(_file(kind, xmp)) == "IPTC: trainedAlgorithmicMedia"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_files_that_claim_nothing(kind):
    assert read_credentials(_file(kind, None)) == ""
    assert read_credentials(_file(kind, "<rdf:Description/>")) == ""


def test_damage_and_hostile_values_are_one_line():
    assert read_credentials(b"") == ""
    assert read_credentials(_file("JPEG", ATTRIBUTE)[:40] + b"DigitalSourceType") == ""
    hostile = ATTRIBUTE.replace("trained", "\x1b[31m\x85")
    assert "\x1b" not in read_credentials(_file("JPEG", hostile))


@pytest.mark.skipif(importlib.util.find_spec("c2pa") is not None, reason="c2pa-python is installed")
def test_a_manifest_is_mentioned_where_it_cannot_be_read():
    found = read_credentials(_file("JPEG", None) + b"....jumb....c2pa....")
    assert found == "C2PA: a manifest, not read (c2pa-python is not installed)"


@pytest.mark.skipif(
    importlib.util.find_spec("c2pa") is None, reason="needs c2pa-python: pip install -e .[c2pa]"
)
def test_a_damaged_manifest_is_said_to_be():
    found = read_credentials(_file("JPEG", None) + b"....jumb....c2pa....")
    assert found.startswith("C2PA: a manifest that cannot be read (")
