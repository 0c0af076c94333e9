"""Strict reading of the tables that users bring: a row is either what its line says, or an error.

Python's csv module reads a damaged table without a word: a quote that is never closed swallows
the rows after it, fields beyond the header's are dropped, missing ones are empty. Here a row is
one line, so that a quote cannot reach into another row. Only a column that is not used may hold
line breaks (prompts do), where none of the lines inside the quotes could be a row of its own.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath

from dataio.core.errors import UserError, reason_of

_QUOTED = re.compile(r'\s*"((?:[^"]|"")*)"\s*(?:,|$)')
_PLAIN = re.compile(r'([^",]*)(?:,|$)')
# Besides control characters, what Unicode and other programs take for the end of a line.
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_INVISIBLE = re.compile(r"[\ufeff\u200b\u200e\u200f]")
_SEPARATORS = {";": "';'", "\t": "tabs", "|": "'|'"}
_WIDE = (  # UTF-32's mark begins with UTF-16's
    (b"\xff\xfe\0\0", "UTF-32"),
    (b"\0\0\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)
_FILE_NAME = re.compile(r"\.\w{1,5}\"?\s*(?:,|$)")  # its end: a field with a suffix
_PACKED = ((b"PK\x03\x04", "a zip file or a workbook"), (b"\x1f\x8b", "packed by gzip"))
_HEAD_BYTES = 4096


class CsvTable:
    """A CSV file in UTF-8 whose first line names the columns; see `rows`.

    Names of columns may be in upper or lower case and have spaces around them. A file may begin
    with a byte order mark, end lines as Windows does, and have blank lines.

    Args:
        path: the file. required: columns it must have. optional: other columns that are used.
        field: the argument that named the file, for messages.

    Attributes:
        columns: the names of the columns, in the file's order, those of `required` and `optional`
            as they are written there.

    Raises:
        UserError: it cannot be read, is not UTF-8, has other separators, lacks a column or names
            one twice.
    """

    def __init__(
        self, path: str | Path, *, required: Sequence[str], optional: Sequence[str] = (), field: str
    ) -> None:
        self.path, self._field = Path(path), field
        self._required, self._optional = tuple(required), tuple(optional)
        self._check_encoding()
        line, header = next(self._lines(), (1, ""))
        self.columns = self._read_header(header, line)
        used = {*required, *optional}
        self._used = [number for number, name in enumerate(self.columns) if name in used]

    def error(self, text: str) -> UserError:
        """An error about this file."""
        return UserError(text, field=self._field, value=self.path)

    def rows(self) -> Iterator[tuple[int, dict[str, str]]]:
        """Yield (line, fields by column) of each row, without white space around the fields.

        Lines count from 1. The file may be too long to hold. Bytes of fields that are not UTF-8 are
        surrogate escapes, as in the names of files.

        Raises:
            UserError: a line with more or fewer fields than the header, a quote that is not closed or
                stands inside a field without quotes, a control character; the line is named.
        """
        lines = self._lines()
        next(lines, None)
        names, width = self.columns, len(self.columns)
        nameless = [number for number, name in enumerate(names) if not name and number > 0]
        for line, text in lines:
            fields = self._split(self._whole_row(text, lines) if '"' in text else text, line)
            if any("\n" in fields[number] for number in self._used if number < len(fields)):
                self._split(text, line)  # raises: a quote is open
            if len(fields) != width:
                other = next(
                    (name for mark, name in _SEPARATORS.items() if text.count(mark) == width - 1), ""
                )
                remedy = (
                    f"values are separated by {other} there, write commas"
                    if other and len(fields) == 1
                    else 'put a value that holds a comma in quotes, as in "crane, bird", and write every comma'
                )
                raise self.error(
                    f"line {line}: {_fields(len(fields))}, expected {width} ({', '.join(names)}); {remedy}"
                )
            # As `cat` leaves it between two files, whose second may begin with a mark.
            if fields[-1] == names[-1] and [_INVISIBLE.sub("", name) for name in fields] == list(names):
                raise self.error(f"line {line}: repeats the header; remove the line")
            for number in nameless:
                if fields[number]:
                    raise self.error(
                        f"line {line}: {fields[number]!r} is in column {number + 1}, which the header does not "
                        "name; name it, or put a value that holds a comma in quotes"
                    )
            if "\t" in text:
                self._refuse_tabs(fields, line)
            yield line, dict(zip(names, fields, strict=True))

    def _lines(self) -> Iterator[tuple[int, str]]:
        """(number, text) of the lines that are not blank."""
        try:
            with open(self.path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
                for line, raw in enumerate(file, start=1):
                    text = raw.rstrip("\r\n")
                    if text and not text.isspace():
                        yield line, text
        except OSError as error:
            raise self.error(f"cannot be read ({reason_of(error)})") from None

    def _check_encoding(self) -> None:
        try:
            with open(self.path, "rb") as file:
                head = file.read(_HEAD_BYTES)
        except OSError as error:
            raise self.error(f"cannot be read ({reason_of(error)})") from None
        except ValueError as error:  # a zero byte in the name
            raise self.error(f"cannot be read ({error})") from None
        packed = next((what for mark, what in _PACKED if head.startswith(mark)), "")
        if packed:
            raise self.error(f"is {packed}, expected a CSV file; unpack it, or save it as CSV UTF-8")
        wide = next((name for mark, name in _WIDE if head.startswith(mark)), "")
        if not wide and head.count(0) * 4 > len(head):  # without a mark
            wide = "UTF-16"
        if wide:
            raise self.error(
                f"is {wide}, expected UTF-8; save it as CSV UTF-8, or convert it with iconv -f {wide} -t UTF-8"
            )

    def _read_header(self, text: str, line: int) -> tuple[str, ...]:
        used = {name.casefold(): name for name in (*self._required, *self._optional)}
        hint = self._hint(text)
        fields = [text] if hint else [_INVISIBLE.sub("", name).strip() for name in self._split(text, line)]
        names = tuple(used.get(name.casefold(), name) for name in fields)
        missing = [name for name in self._required if name not in names]
        if missing:
            expected = ", ".join(self._required)
            if self._optional:
                expected += f" [, {', '.join(self._optional)}]"
            found = ", ".join(fields) or "nothing"
            hint = hint or _header_hint(fields[0])
            raise self.error(f"no column {missing[0]!r}; expected {expected}, found {found!s:.200}{hint}")
        twice = next((name for name in names if name and names.count(name) > 1), None)
        if twice is not None:
            raise self.error(f"the header has the column {twice!r} twice; remove or rename one")
        return names

    def _hint(self, header: str) -> str:
        for separator, name in _SEPARATORS.items():
            columns = {column.strip(' "').casefold() for column in header.split(separator)}
            if columns.issuperset(self._required) and len(self._required) > 1:
                return f"; its values are separated by {name}, write it with commas"
        return ""

    def _split(self, text: str, line: int) -> list[str]:
        if character := _CONTROL.search(text.replace("\n", " ")):
            raise self.error(
                f"line {line}: holds the control character U+{ord(character[0]):04X}; remove it, or copy "
                "the file again if it is damaged"
            )
        if '"' not in text:
            return [field.strip() for field in text.split(",")]
        fields, position = [], 0
        while True:
            if match := _QUOTED.match(text, position):
                fields.append(match[1].replace('""', '"').strip())
            elif match := _PLAIN.match(text, position):
                fields.append(match[1].strip())
            else:
                raise self.error(f"line {line}: {_quote_problem(text, position)}")
            position = match.end()
            if position == len(text):
                return [*fields, ""] if match[0].endswith(",") else fields

    def _whole_row(self, text: str, lines: Iterator[tuple[int, str]]) -> str:
        """A row with the lines that follow while a quote is open, joined by line feeds.

        The row is left as it is, with its quote open, where a line inside the quotes could be a row of
        its own: then the quote was probably forgotten, and would swallow that row.
        """
        joined = text
        while _is_open(joined):
            following = next(lines, None)
            if following is None:
                return text
            # Where paths have suffixes, a prompt's "tree, blue sky, 8k" is no row.
            named = _FILE_NAME.search(following[1]) or not _FILE_NAME.search(text)
            if named and self._may_be_row(following[1]):
                return text
            joined += "\n" + following[1]
        return joined

    def _may_be_row(self, text: str) -> bool:
        try:
            return len(self._split(text, 0)) == len(self.columns)
        except UserError:
            return False

    def _refuse_tabs(self, fields: Sequence[str], line: int) -> None:
        for number in self._used:
            if "\t" in fields[number]:
                raise self.error(
                    f"line {line}: {self.columns[number]} {fields[number]!r} holds a tab; remove it"
                )


def is_utf8(text: str) -> bool:
    """Whether a field's bytes were UTF-8; see `CsvTable.rows`."""
    return _SURROGATE.search(text) is None


def _header_hint(first: str) -> str:
    if first.casefold().startswith("sep="):
        return "; remove this line of a spreadsheet: the next one names the columns"
    return "; the first line must name the columns" if PurePath(first).suffix else ""


def _is_open(text: str) -> bool:
    """Whether a quote that a field begins with is not closed in the text."""
    position = 0
    while position < len(text):
        match = _QUOTED.match(text, position) or _PLAIN.match(text, position)
        if match is None:
            return _opens(text[position:].lstrip())
        position = match.end()
        if match[0] == "":
            break
    return False


def _opens(field: str) -> bool:
    return field.startswith('"') and field.replace('""', "").count('"') % 2 == 1


def _fields(count: int) -> str:
    return "1 field" if count == 1 else f"{count} fields"


def _quote_problem(text: str, position: int) -> str:
    """Why the field that begins at `position` cannot be read."""
    field = text[position:].lstrip()
    shown = repr(field if len(field) <= 40 else field[:39] + "…")
    if _opens(field):
        return f"a quote is opened and not closed on the line, at {shown}; close it"
    return (
        f"a quote stands inside a value, at {shown}; put the whole value in quotes and write its own twice, "
        'as in "24"" screen"'
    )
