"""Names that users type: spellings of one label become one name, and the photographs' name is decided.

A spelling is folded where it is certain that no two labels are meant: the normal form of Unicode,
invisible characters, white space. Where two names only look alike, the user decides.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from difflib import get_close_matches
from itertools import pairwise

PHOTOGRAPHS = "nature"
_SHOWN = 3  # pairs that a note names
_CLOSE = 0.8  # difflib's ratio of a mistyped word

_KINDS = ("real", "authentic", "genuine", "natural", "original", "pristine", "bonafide")
_THINGS = ("nature", "photo", "photos", "photograph", "photographs", "camera", "human", "humans")
_PLURALS = ("reals", "naturals", "originals", "photography")
_FILLERS = ("image", "images", "img", "imgs", "picture", "pictures", "pic", "pics", "class", "label", "the")
_REAL = frozenset((*_KINDS, *_THINGS, *_PLURALS))
_FAKE = frozenset(("fake", "fakes", "ai", "generated", "synthetic", "artificial", "manipulated", "deepfake"))
_NOT = frozenset(("not", "non", "no", "never"))
_PHRASES = frozenset((("bona", "fide"), ("human", "made"), ("camera", "made"), ("real", "world")))
_UNDECIDED = frozenset(
    ("0", "1", "-1", "true", "false", "yes", "no", "t", "f", "y", "n", "positive", "negative", "pos", "neg")
)
_NO_VALUE = frozenset(("nan", "none", "null", "nil", "n/a", "na", "<na>", "#n/a", "undefined", "-", "?"))
_NUMBER = re.compile(r"[+-]?\d+(?:\.\d*)?")
_QUOTES = "\"'`\u00b4\u2018\u2019\u201a\u201b\u201c\u201d\u201e\u201f\u00ab\u00bb\u2039\u203a\u2032\u2033\uff02\uff07"
_BREAKS = re.compile(r"[\s_\-\u2010-\u2015\u2212]+")
_WORD = re.compile(r"[^\W\d_]+|\d+")
_JOINED = re.compile(f"({'|'.join(_KINDS)})({'|'.join((*_THINGS, *_FILLERS))})")
_HUMP = re.compile(r"(?<=[a-z])(?=[A-Z])")
# Cyrillic and Greek letters that look like Latin ones: a slip where a word has Latin letters too.
_TWINS = str.maketrans(
    "\u0430\u0441\u0435\u043e\u0440\u0445\u0443\u0456\u0455\u0458\u03bf\u03b1\u03bd\u03c1\u03c4",
    "aceopxyisjoavpt",
)
# Drawn as nothing, though not in the category of format characters (Cf).
_DRAWN_AS_NOTHING = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u3164\uffa0")


@dataclass
class Spelling:
    """A label as it is written: the line where it comes first, and how many rows have it."""

    line: int
    rows: int = 0


def tidy(text: str) -> str:
    """A label in the normal form NFC, without invisible characters, and with single spaces only inside."""
    if text.isascii() and " " not in text:
        return text
    kept = (
        c
        for c in unicodedata.normalize("NFC", text)
        if unicodedata.category(c) != "Cf" and c not in _DRAWN_AS_NOTHING and not "\ufe00" <= c <= "\ufe0f"
    )
    # Again: what stood between a letter and its accent may be gone.
    return unicodedata.normalize("NFC", " ".join("".join(kept).split()))


def look_of(text: str) -> str:
    """What two labels share that only look different: case, normal form, quotes, breaks, a number's spelling."""
    plain = unicodedata.normalize("NFKC", tidy(text)).casefold().strip(_QUOTES + " ")
    plain = _latin(unicodedata.normalize("NFKC", plain))
    if _NUMBER.fullmatch(plain):
        number = Decimal(plain) + 0  # "-0" is 0
        return str(number.to_integral_value() if number == number.to_integral_value() else number.normalize())
    return _BREAKS.sub(" ", plain).strip() or plain


def _latin(text: str) -> str:
    """A text in lower case with Latin letters in place of their twins, if it has Latin ones."""
    return text.translate(_TWINS) if not text.isascii() and re.search("[a-z]", text) else text


def _readings(text: str) -> list[list[str]]:
    """A name's words in lower case: as "RealPhoto" is meant, and as "reaL" is."""
    plain = unicodedata.normalize("NFKC", tidy(text))
    readings: list[list[str]] = []
    for written in (_HUMP.sub(" ", plain), plain):
        words: list[str] = []
        for word in _WORD.findall(_latin(written.casefold())):
            joined = _JOINED.fullmatch(word)
            words += joined.groups() if joined else [word]
        readings.append(words)
    return readings


def _telling(words: Sequence[str]) -> list[str]:
    """Words without those that say nothing, such as "image" and "class"."""
    return [word for word in words if word not in _FILLERS]


def names_photographs(text: str) -> bool:
    """Whether a name says that its images are photographs: "Real", "0_real", "natural images"."""
    return any(_name_photographs(_telling(words)) for words in _readings(text))


def _name_photographs(words: list[str]) -> bool:
    if len(words) > 1 and words[0].isdecimal():
        words = words[1:]
    if tuple(words) in _PHRASES:
        return True
    # "photo-real" is a style; which one is meant is asked.
    styled = any(first in _THINGS and second in _KINDS for first, second in pairwise(words))
    return bool(words) and _REAL.issuperset(words) and not styled


def is_undecided(text: str) -> bool:
    """Whether a name may mean photographs or fakes: "0", "true", "nan", "not fake", "real1"."""
    look = look_of(text)
    if look in _UNDECIDED or look in _NO_VALUE:
        return True
    return not names_photographs(text) and any(_are_undecided(_telling(words)) for words in _readings(text))


def _are_undecided(words: list[str]) -> bool:
    if not words:
        return False
    if "".join(words) in _REAL:  # "n ature"
        return True
    if words[0] in ("nonfake", "notfake") or (words[0] in _NOT and len(words) > 1):
        return _FAKE.issuperset(words[1:])
    if len(words) == 1 and words[0] in _UNDECIDED:  # "class 0"
        return True
    rest = [word for word in words if not word.isdecimal()]
    return bool(rest) and _REAL.issuperset(rest)


def _resembles_real(name: str) -> bool:
    """Whether a generator's name holds a word for photographs, or may be one mistyped: "nautre", "photon"."""
    words = _readings(name)[0]
    mistyped = len(words) == 1 and len(words[0]) > 3 and get_close_matches(words[0], _REAL, 1, _CLOSE)
    return not _REAL.isdisjoint(words) or bool(mistyped)


def fold_generators(
    spellings: Mapping[str, Spelling], real: Sequence[str] | None = None
) -> tuple[dict[str, str], list[str]]:
    """Decide which generators are meant, and which are the photographs.

    Args:
        spellings: what the rows say. real: names of the photographs; None where the user gives none:
            then those of which `names_photographs` is true.

    Returns:
        {spelling: name}, "nature" for photographs; and what the user should know, a line each.

    Raises:
        ValueError: what the user must decide or correct, in one line.
    """
    notes: list[str] = []
    chosen = _photographs(spellings, real)
    names = {text: PHOTOGRAPHS if text in chosen else tidy(text) for text in spellings}
    _refuse_look_alikes(names, spellings)
    others = sorted(text for text in chosen if text != PHOTOGRAPHS)
    if others:
        described = ", ".join(f"{_shown(text)} ({_rows(spellings[text].rows)})" for text in others)
        notes.append(f"generator {described}: read as photographs, named {PHOTOGRAPHS}")
    notes += _changed("generator", {text: name for text, name in names.items() if text not in chosen})
    if real is None:
        mentioned = sorted({name for name in names.values() if name != PHOTOGRAPHS and _resembles_real(name)})
        if mentioned:
            notes.append(
                f"generator {_first(mentioned)}: read as fakes; if they are photographs, say so with real (--real)"
            )
    return names, notes


def fold_objects(spellings: Mapping[str, Spelling]) -> tuple[dict[str, str], list[str]]:
    """Decide which objects are meant; names that only look alike stay apart.

    Returns:
        {spelling: name}; and what the user should know, a line each.
    """
    names = {text: tidy(text) for text in spellings}
    notes = _changed("object", names)
    alike = defaultdict(set)
    for name in names.values():
        alike[look_of(name)].add(name)
    pairs = [" and ".join(map(_shown, sorted(group))) for group in alike.values() if len(group) > 1]
    if pairs:
        notes.append(
            f"objects that look alike are kept apart: {_first(sorted(pairs), quoted=False)}; "
            "write each in one way if they are one"
        )
    empty = sorted({name for name in names.values() if name and look_of(name) in _NO_VALUE})
    if empty:
        notes.append(f"object {_first(empty)} is taken for a name; leave the field empty if it is unknown")
    return names, notes


def parse_names(text: str) -> list[str]:
    """The names in a list with commas; a name that holds a comma is in quotes.

    Raises:
        ValueError: an empty name, or a quote that is not closed.
    """
    if not re.fullmatch(r'(?:"[^"]*"|[^,"]*)(?:,(?:"[^"]*"|[^,"]*))*', text):
        raise ValueError("expected names with commas between them; put a name that holds a comma in quotes")
    names = [
        (quoted or plain).strip() for quoted, plain in re.findall(r'(?:^|,)(?:"([^"]*)"|([^,"]*))', text)
    ]
    if not all(names):
        raise ValueError("holds an empty name; expected names with commas between them")
    return names


def _photographs(spellings: Mapping[str, Spelling], real: Sequence[str] | None) -> set[str]:
    """The spellings that are photographs."""
    if real is not None:
        looks = {look_of(name) for name in real}
        chosen = {text for text in spellings if look_of(text) in looks}
        found = {look_of(text) for text in chosen}
        for name in real:
            if look_of(name) not in found:
                raise ValueError(
                    f"real (--real) names {name!r}, and no row has it; generators are {_all(spellings)}"
                )
        left = sorted(text for text in set(spellings) - chosen if names_photographs(text))
        if left:
            raise ValueError(
                f"generator {_where(left[0], spellings)} is a word for photographs, and real (--real) does not "
                "list it; list it, or rename it if it is a generator"
            )
        return chosen
    undecided = sorted(filter(is_undecided, spellings), key=lambda text: spellings[text].line)
    if undecided:
        raise ValueError(
            f"generator {_where(undecided[0], spellings)} does not say whether it means photographs or fakes; "
            f"name the photographs with real (--real NAME); generators are {_all(spellings)}"
        )
    return {text for text in spellings if names_photographs(text)}


def _refuse_look_alikes(names: Mapping[str, str], spellings: Mapping[str, Spelling]) -> None:
    first: dict[str, str] = {}
    for text, name in names.items():
        if name == PHOTOGRAPHS:
            continue
        if not name:
            raise ValueError(f"line {spellings[text].line}: generator {text!r} has no visible character")
        other = first.setdefault(look_of(text), text)
        if names[other] != name:
            raise ValueError(
                f"generators {_where(other, spellings)} and {_where(text, spellings)} look alike; write them in "
                "one way if they are one, or rename one"
            )


def _changed(what: str, names: Mapping[str, str]) -> list[str]:
    changed = sorted(text for text, name in names.items() if name != text)
    if not changed:
        return []
    pairs = ", ".join(f"{text!a} as {names[text]!r}" for text in changed[:_SHOWN])
    return [f"{what} names read without invisible characters or in one normal form: {pairs}{_more(changed)}"]


def _where(text: str, spellings: Mapping[str, Spelling]) -> str:
    """A spelling and its line; escaped where a reader would not see what it is."""
    return f"{_shown(text)} (line {spellings[text].line})"


def _shown(text: str) -> str:
    plain = tidy(text) == text and unicodedata.is_normalized("NFKC", text)
    return repr(text) if plain and _latin(text.casefold()) == text.casefold() else ascii(text)


def _all(spellings: Iterable[str]) -> str:
    return _first(sorted(spellings), limit=10)


def _first(texts: Sequence[str], *, limit: int = _SHOWN, quoted: bool = True) -> str:
    shown = [repr(text) if quoted else text for text in texts[:limit]]
    return f"{', '.join(shown)}{_more(texts, limit)}"


def _more(texts: Sequence[str], limit: int = _SHOWN) -> str:
    return f" and {len(texts) - limit} more" if len(texts) > limit else ""


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"
