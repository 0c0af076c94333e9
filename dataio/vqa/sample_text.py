"""Whether a text can be tokenized, and ids that name one sample each."""

import re
import unicodedata
from collections import Counter

from dataio.core.errors import UserError

# Control characters but those that texts are laid out with, and surrogates.
_NO_TEXT = re.compile("[\0-\x08\x0e-\x1f\ud800-\udfff]")


def text_fault(text: str) -> str:
    r"""What a text holds that is no text, such as "a lone surrogate, \ud83d"; "" for nothing.

    JSON can hold half of a character's two code units, which no encoding and no tokenizer takes.
    """
    match = _NO_TEXT.search(text)
    if match is None:
        return ""
    code = ord(match[0])
    if code < 32:
        return f"a control character, \\x{code:02x}"
    return f"a lone surrogate, \\u{code:04x}: half of a character that was cut in two"


def is_blank(text: str) -> bool:
    """Whether a text shows nothing: white space, and characters without width."""
    return all(c.isspace() or unicodedata.category(c) in ("Cc", "Cf") for c in text)


def escaped(text: str) -> str:
    r"""The text with what cannot be printed or encoded as \x00, \ud83d, ..."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def check_label(label: str, kind: str, reserved: str) -> None:
    """Refuse a label that cannot be part of a question.

    Args:
        kind: what it labels, for the message. reserved: a text that it must not contain.

    Raises:
        UserError: it is blank, or holds something other than text, or `reserved`.
    """
    fault = text_fault(label) or ("nothing visible" if is_blank(label) else "")
    if not fault and reserved in label:
        fault = f"{reserved}, which stands for an image in questions"
    if fault:
        raise UserError(f"the {kind} {escaped(label)!r} holds {fault}; rename it and write the shards again")


class UniqueIds:
    """Names samples by their ids, and those whose id has occurred by their order: "a", "a#2", "a#3".

    LLaVA-Instruct's id is the image's, so that several questions about an image share it.

    Attributes:
        repeated: how many samples had an id that had occurred. first: the first such id.
    """

    def __init__(self) -> None:
        self.repeated, self.first = 0, ""
        self._seen: Counter[str] = Counter()

    def name(self, given: str) -> str:
        """The next sample's name."""
        self._seen[given] += 1
        if self._seen[given] == 1:
            return given
        self.repeated += 1
        self.first = self.first or given
        name = f"{given}#{self._seen[given]}"
        while name in self._seen:  # another sample's own id
            self._seen[given] += 1
            name = f"{given}#{self._seen[given]}"
        self._seen[name] += 1
        return name

    def __str__(self) -> str:
        """A note for the log."""
        which = "sample has" if self.repeated == 1 else "samples have"
        return f"{self.repeated} {which} the id of an earlier one and are named {self.first}#2 and so on"
