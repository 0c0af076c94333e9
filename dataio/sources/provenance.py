"""What an image file says of its own origin; anybody can write or strip it, so it does not affect the score.

Two sources: the IPTC property DigitalSourceType in the XMP packet (IPTC Photo Metadata
Standard; vocabulary at http://cv.iptc.org/newscodes/digitalsourcetype/), and C2PA manifests,
by the package c2pa-python where that is installed.
"""

import importlib
import importlib.util
import io
import json
import re
from typing import Any

from PIL import Image

_SOURCE_TYPE = re.compile(
    rb"""DigitalSourceType(?:(?:\s+rdf:resource)?\s*=\s*["']|[^<>]*>\s*)([^"'<>\s]+)""",
)
_NO_C2PA = "C2PA: a manifest, not read (c2pa-python is not installed)"


def read_credentials(source: bytes) -> str:
    """What a file claims, such as "IPTC: trainedAlgorithmicMedia"; "" where it claims nothing.

    Args:
        source: the file's bytes, of any format; damaged ones claim nothing.
    """
    return "; ".join(filter(None, (_iptc(source), _c2pa(source))))


def _iptc(source: bytes) -> str:
    if b"DigitalSourceType" not in source and b"XMP" not in source and b"xmp" not in source:
        return ""
    try:
        with Image.open(io.BytesIO(source)) as image:
            packet = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp") or b""
    # As many kinds of error as there are kinds of damage, and `encode` names them.
    except Exception:
        return ""
    if isinstance(packet, str):
        packet = packet.encode("utf-8", "replace")
    # Searched, not parsed: an XML parser can be made to use up the memory.
    match = _SOURCE_TYPE.search(packet)
    if match is None:
        return ""
    name = match[1].decode("ascii", "replace").rstrip("/").rpartition("/")[2]
    return f"IPTC: {_one_line(name)}"


def _c2pa(source: bytes) -> str:
    # Manifests lie in JUMBF boxes labelled c2pa (C2PA specification, section 11.1).
    if b"jumb" not in source or b"c2pa" not in source:
        return ""
    if importlib.util.find_spec("c2pa") is None:
        return _NO_C2PA
    c2pa = importlib.import_module("c2pa")
    try:
        with Image.open(io.BytesIO(source)) as image:
            kind = Image.MIME.get(image.format or "", "")
        # An image must not make this program call a host of its choice.
        context = c2pa.Context.from_dict({"verify": {"remote_manifest_fetch": False, "ocsp_fetch": False}})
        with c2pa.Reader(kind, io.BytesIO(source), context=context) as reader:
            return f"C2PA: {_describe(json.loads(reader.json()))}"
    except Exception as error:  # whatever the package finds wrong with a manifest
        return f"C2PA: a manifest that cannot be read ({_one_line(str(error))})"


def _describe(store: dict[str, Any]) -> str:
    """Validity, claim generator and source types of the active manifest."""
    manifest = store.get("manifests", {}).get(store.get("active_manifest", ""), {})
    words = [f"state {store.get('validation_state', 'unknown')}"]
    generators = manifest.get("claim_generator_info") or [{}]
    name = generators[0].get("name") or manifest.get("claim_generator")
    if name:
        words.append(f"by {_one_line(str(name))}")
    types = re.findall(r'"digitalSourceType": "([^"]+)"', json.dumps(manifest))
    words += sorted({_one_line(value.rstrip("/").rpartition("/")[2]) for value in types})
    return ", ".join(words)


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)[:100].strip()
