"""What a file is that was given as a zip and is none: a piece of one, or one that ends early."""

import re
from pathlib import Path

# NAME.z01 (zip -s), NAME.zip.001 (7-Zip), NAME.z000, NAME.zip.000, NAME.00, NAME.aa, NAME.partaa (split).
_PIECE = re.compile(r"(.+)\.(?:(z)(\d{2,4})|(part_?|)(\d{2,4}|[a-z]{2,3}))", re.IGNORECASE)


def explain_no_zip(path: Path) -> str:
    """Why a file is no zip, and what to do; tells to give only files that exist.

    Args:
        path: of a file that `is_zip` refuses.
    """
    if text := explain_piece(path):
        return text
    head = _head(path)
    size = f"{path.stat().st_size:,} bytes"
    if not head:
        return "is empty (0 bytes); download it again"
    if _begins_zip(head):
        return f"is a zip file that ends early ({size}); download it again"
    if _pieces(path.parent, path.stem, "z", "01"):
        return f"is the last part of a split archive and ends early ({size}); download it again"
    if head.lstrip()[:5].lower() in (b"<!doc", b"<html"):
        return "is a web page, not a zip file; download it again"
    return "neither a folder nor a zip file"


def explain_piece(path: Path) -> str:
    """As `explain_no_zip`, for a piece of a zip by its name; "" for other names.

    The last piece looks like a zip to Python.
    """
    piece = _PIECE.fullmatch(path.name)
    if piece is None:
        return ""
    stem, mark, count = piece[1], piece[2] or piece[4], piece[3] or piece[5]
    pieces = _pieces(path.parent, stem, mark, count)
    counts = [name[-len(count) :] for name in pieces]
    # In two digits from .z01, as zip -s and WinZip do it. `split` begins at 0, and with .aa.
    if piece[2] and int(counts[0]) > 0 and not count.startswith("00"):
        last = next((p.name for p in path.parent.iterdir() if p.name.lower() == f"{stem}.zip".lower()), "")
        if last:
            return f"a part of an archive; give its last part, {last}"
        return f"a part of an archive whose last part, {stem}.zip, is not beside it; copy it there"
    of_zip = stem.lower().endswith(".zip")
    begins = counts[0].strip("0") in ("", "1") if count.isdigit() else counts[0].lower().strip("a") == ""
    if begins and of_zip and not mark and count.isdigit():
        return f"a part of an archive; give its first part, {pieces[0]}"
    if begins and _begins_zip(_head(path.with_name(pieces[0]))):
        target = stem if of_zip else f"{stem}.zip"
        pattern = _quoted(f"{stem}.{mark}") + ("[0-9]" if count.isdigit() else "[a-z]") * len(count)
        which = f"{pieces[0]} to {pieces[-1]}" if len(pieces) > 1 else "the others are not beside it"
        return (
            f"one of the pieces of a cut zip ({which}); join all with `cat {pattern} > {_quoted(target)}` "
            f"and give {target}"
        )
    if of_zip or piece[2]:
        return "a part of an archive whose first part is not beside it; copy it there"
    return ""


def _pieces(folder: Path, stem: str, mark: str, count: str) -> list[str]:
    """Names in the folder that differ in the count only, in order."""
    kind = r"\d" if count.isdigit() else "[a-z]"
    name = re.compile(rf"{re.escape(f'{stem}.{mark}')}{kind}{{{len(count)}}}", re.IGNORECASE)
    return sorted(path.name for path in folder.iterdir() if name.fullmatch(path.name))


def _quoted(text: str) -> str:
    """Escaped for a shell, without quotes: a pattern may follow."""
    return re.sub(r"([^\w./%+,:=@-])", r"\\\1", text)


def _head(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(512)
    except OSError:
        return b""


def _begins_zip(head: bytes) -> bool:
    # The last begins the first part of a split archive: APPNOTE.TXT 8.5.3.
    return head.startswith((b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08"))
