"""Why a path of a list names no file: a file of almost this name, in words for an error."""

import os
import re
import unicodedata
from urllib.parse import unquote

from dataio.sources.source import Source

_FILE = re.compile(r"file:/+(?:localhost/)?", re.IGNORECASE)
_WEB = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)
_BACKSLASH, _BELOW = "folders are separated by '/', not by a backslash", "paths are below the root"
_ADDRESS, _PERCENT = f"{_BELOW}, without file://", "codes with % are not decoded"


def hint_for(source: Source, path: str) -> str:
    """One sentence about a path that `source` does not have; "" where nothing comes close.

    Tried are file:// and web addresses, paths that begin with the root or its name, backslashes,
    upper and lower case, the normal forms of Unicode, invisible characters, bytes that are not
    UTF-8, and another suffix.
    """
    if _WEB.match(path) and not _FILE.match(path):
        return f"{path!r} is an address, and images are read from files; download it"
    for candidate, why in _candidates(source, path):
        found = _nearest(source, candidate)
        if found is not None:
            reasons = [why] if why else []
            reasons += [_difference(candidate, found)] if found != candidate else []
            return f"{path!r} is {_shown(found)} there: {' and '.join(reasons)}"
    if _FILE.match(path):
        return f"{path!r}: {_ADDRESS}"
    if "\\" in path:
        return f"{path!r}: {_BACKSLASH}"
    return "" if _decoded(path) == path else f"{path!r} is not UTF-8; save the list as UTF-8"


def _candidates(source: Source, path: str) -> list[tuple[str, str]]:
    """What a path may stand for, each with what is wrong with the path then."""
    if _FILE.match(path):
        below = _below_root(source, _FILE.sub("/", path))
        return [(below, _ADDRESS), (unquote(below), f"{_ADDRESS}, {_PERCENT}")]
    listed = [(path, "")]
    if "\\" in path:
        listed.append((_below_root(source, path.replace("\\", "/")), _BACKSLASH))
    if "%" in path:
        listed.append((unquote(path), _PERCENT))
    listed += [(_below_root(source, path), _BELOW), (path.partition("/")[2], _BELOW)]
    return [(text, why) for text, why in listed if text and (text == path) == (not why)]


def _below_root(source: Source, path: str) -> str:
    """A path without what it has in common with the root."""
    root = os.path.abspath(source.path)
    for start in (root, str(source.path), os.path.basename(root)):
        if path.startswith(start + "/"):
            return path[len(start) + 1 :]
    return path


def _nearest(source: Source, path: str) -> str | None:
    """The one file whose path differs from `path` in spelling only."""
    if path.startswith("/") or ".." in path.split("/"):
        return None
    if source.has(path):
        return path
    if source.is_zip:
        wanted = _spelling(path)
        names = list(source.files())
        same = next((name for name in names if _spelling(name) == wanted), None)
        wanted = _stem(wanted)
        return same or next((name for name in names if _stem(_spelling(name)) == wanted), None)
    folder = ""
    *folders, name = [part for part in path.split("/") if part]
    for part in folders:
        child = _child(source, folder, part)
        if child is None:
            return None
        folder = f"{folder}{child}/"
    found = _child(source, folder, name) or _child(source, folder, name, stem=True)
    return None if found is None or not source.has(folder + found) else folder + found


def _child(source: Source, folder: str, part: str, *, stem: bool = False) -> str | None:
    try:
        names = os.listdir(source.path / folder)
    except (OSError, ValueError):
        return None
    if not stem and part in names:
        return part
    key = _spelling(_stem(part) if stem else part)
    alike = [name for name in names if _spelling(_stem(name) if stem else name) == key]
    return alike[0] if len(alike) == 1 else None


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]


def _spelling(name: str) -> str:
    plain = _decoded(name)
    visible = "".join(c for c in plain if unicodedata.category(c) not in ("Cf", "Zs"))
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", visible).casefold())


def _decoded(name: str) -> str:
    """A name whose bytes are not UTF-8, as Western European programs mean it."""
    try:
        name.encode()
        return name
    except UnicodeEncodeError:
        return os.fsencode(name).decode("cp1252", "replace")


def _shown(name: str) -> str:
    return ascii(name) if _decoded(name) != name or not unicodedata.is_normalized("NFC", name) else repr(name)


def _difference(path: str, found: str) -> str:
    if _decoded(path) != path:
        return "the list is not UTF-8; save it as UTF-8"
    if _decoded(found) != found:
        return "the file's name is not UTF-8; rename the file"
    if path.casefold() == found.casefold():
        return "upper and lower case must be the same"
    normal = unicodedata.normalize("NFC", path)
    if normal.casefold() == unicodedata.normalize("NFC", found).casefold():
        return f"the list has Unicode's form {_form(path)}, the file {_form(found)}; they must be the same"
    if _spelling(path) == _spelling(found):
        return "white space or an invisible character differs"
    return "the suffix differs"


def _form(name: str) -> str:
    return "NFC" if unicodedata.is_normalized("NFC", name) else "NFD"
