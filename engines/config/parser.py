"""The argument parser of every command, and the typed configurations that it reads.

A configuration is a dataclass of dataclasses. A YAML file states what an experiment changes;
dotted flags override the file (`--optim.lr 0.05`).
"""

import difflib
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace, set_parsing_settings

from dataio.core.errors import UserError, one_line
from engines.config.values import flatten, plain
from engines.config.yaml_file import check_config_file
from engines.runtime.paths import find_config

C = TypeVar("C")

# The docstrings below a dataclass's attributes are the help texts.
set_parsing_settings(docstring_parse_attribute_docstrings=True)


class Parser(ArgumentParser):
    """jsonargparse's parser, with errors as one line, no abbreviated flags, and suggestions.

    Abbreviations are off because `--optim.l` would silently set `--optim.lr`.

    Args:
        command: name of the command, as in `telltale train`.
        doc: docstring of its module. Indented lines are the examples, shown at the end of the
            help; the rest is the description.
    """

    def __init__(self, command: str = "", doc: str | None = "", **kwargs: Any) -> None:
        description, examples = _split_doc(doc or "")
        kwargs.setdefault("prog", f"telltale {command}".rstrip())
        kwargs.setdefault("description", description)
        kwargs.setdefault("epilog", f"Examples:\n{examples}" if examples else None)
        super().__init__(allow_abbrev=False, formatter_class=_HelpFormatter, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the parser's (often many-lined) message as one UserError line."""
        text = one_line(ex if ex is not None and str(ex) else message)
        text = re.sub(r"Expected an? <class '(\w+)'>", r"expected \1", text)
        # A key of several types, such as train.pass_images.
        text = re.sub(
            r"Does not validate against .*? Errors: - (.*) Given value type: .*? Given value:",
            lambda match: f"{match[1].replace(' - Expected a typing.Literal', ' or one of ')}. Got value:",
            text,
        )
        flags = [flag for action in self._actions for flag in action.option_strings]
        if match := re.search(r"arguments are required: (.+)", text):
            # jsonargparse names the value; the user types the flag.
            named = [f"--{name}" if f"--{name}" in flags else name for name in _dashed(match[1])]
            text = f"{text[: match.start(1)]}{', '.join(named)}"
        close = _suggest(text, flags)
        raise UserError(f"{text}{f'; did you mean {close}?' if close else ''} (see --help)") from None


class _HelpFormatter(DefaultHelpFormatter):
    """Keeps the line breaks of description and examples, and in the help of a flag what is quoted."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text

    def _split_lines(self, text: str, width: int) -> list[str]:
        # argparse breaks lines at hyphens, also between "--" and a flag's name.
        whole = re.sub(r'"[^"]*"', lambda quoted: quoted[0].replace(" ", "\0"), one_line(text))
        lines = textwrap.wrap(whole, width, break_on_hyphens=False, break_long_words=False)
        return [line.replace("\0", " ") for line in lines]


def _split_doc(doc: str) -> tuple[str, str]:
    """A module's docstring as (prose, examples)."""
    prose: list[str] = []
    examples: list[str] = []
    for paragraph in re.split(r"\n\s*\n", doc.rstrip()):
        (examples if paragraph.startswith("    ") else prose).append(paragraph.lstrip("\n"))
    return "\n\n".join(prose), "\n".join(examples)


def _suggest(message: str, flags: Sequence[str]) -> str:
    """The nearest right spelling of what a parser's message refuses; "" if nothing is near."""
    if match := re.search(r"unrecognized arguments: (--[^\s=]+)", message, re.I):
        return _nearest(match[1], flags)
    if match := re.search(r"Group '(.+?)' does not accept option '(.+?)'", message):
        return _nearest(f"--{match[1]}.{match[2]}", flags).removeprefix("--")
    if match := re.search(r"Option '(.+?)' is not accepted", message):
        return _nearest(f"--{match[1]}", flags).removeprefix("--")
    if match := re.search(r"Literal\[(.+?)\]. Got value: (\S+)", message):
        return _nearest(match[2], re.findall(r"'(.+?)'", match[1]))
    if match := re.search(r"invalid choice: '(.*?)' \(choose from (.+)\)", message):
        return _nearest(match[1], re.findall(r"'(.+?)'", match[2]))
    return ""


def _dashed(names: str) -> list[str]:
    """The names of a list as flags spell them: false_alarm_rate is false-alarm-rate."""
    return names.replace("_", "-").split(", ")


def _nearest(word: str, known: Sequence[str]) -> str:
    """The known spelling that is nearest to `word`, also where only its section is missing."""
    last = word.lstrip("-")
    close = [name for name in known if name.rpartition(".")[2] == last]
    close = close or difflib.get_close_matches(word, known, 1)
    return next(iter(close), "")


def parse_int_list(flag: str, text: str, *, least: int = 1, example: str) -> list[int]:
    """The numbers of a flag such as --gpus 1,4,8.

    Raises:
        UserError: something else, or a number below `least`.
    """
    try:
        counts = [int(word) for word in text.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < least:
        raise UserError(f"{flag} {text}: expected numbers from {least} on, such as {example}")
    return counts


def split_known_flags(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The command's own arguments, and the dotted flags with their values, which go to a training."""
    own_argv: list[str] = []
    flags: list[str] = []
    target = own_argv
    for word in argv:
        if word.startswith("--"):
            target = flags if "." in word.partition("=")[0] else own_argv
        target.append(word)
    return own_argv, flags


def make_parser(kind: type, command: str = "", doc: str | None = "") -> Parser:
    """A parser of a configuration: --config, and a dotted flag for each key.

    Args:
        kind: the configuration's class, whose docstrings are the help. command, doc: see `Parser`.
    """
    parser = Parser(command, doc, default_env=False)
    parser.add_argument("--config", action="config", help="YAML file of the experiment, see configs/")
    parser.add_class_arguments(kind, nested_key=None)
    # Launchers (deepspeed, older torch) add this one; the environment says the same.
    parser.add_argument(
        "--local_rank", "--local-rank", type=int, default=None, help="ignored; accepted for launchers"
    )
    return parser


def parse_as(kind: type[C], argv: Sequence[str], default_file: str | Path) -> C:
    """Parse flags over the YAML file they name, or over `default_file`.

    Args:
        kind: the configuration's class.

    Raises:
        UserError: an unknown key, a value out of range, an unreadable file; names the key
            and the file.
    """
    flags, file = _split_config_flag(list(argv))
    path = find_config(file if file is not None else default_file)
    if path.is_dir():
        raise UserError(f"--config {path}: is a folder, expected a YAML file; see the configs/ folder")
    if not path.is_file():
        raise UserError(f"--config {path}: no such file; see the configs/ folder")
    check_config_file(path, kind)
    parser = make_parser(kind)
    try:
        # The file is parsed by itself first, so that its errors name it; flags follow.
        parser.parse_args(["--config", str(path)])
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    parsed = parser.parse_args(["--config", str(path), *flags])
    return instantiate(parser, parsed, path, kind)


def _split_config_flag(argv: list[str]) -> tuple[list[str], str | None]:
    """Take `--config X` out of the flags wherever it stands, so that flags always win."""
    rest: list[str] = []
    file: str | None = None
    words = iter(argv)
    for word in words:
        if word == "--config":
            file = next(words, None)
            if file is None:
                raise UserError("--config: expected a YAML file after it")
        elif word.startswith("--config="):
            file = word.removeprefix("--config=")
        else:
            rest.append(word)
    return rest, file


def instantiate(parser: Parser, parsed: Namespace, path: Path, kind: type[C]) -> C:
    """The typed configuration of parsed values, which came from `path` and flags.

    Raises:
        UserError: a value is missing or out of range.
    """
    parsed = parsed.clone()
    for key in ("config", "local_rank"):
        parsed.pop(key, None)
    empty = sorted(key for key, value in flatten(plain(parsed.as_dict())).items() if value is None)
    if empty:
        raise UserError(
            f"{empty[0]} has no value (null), expected one; give it or leave it out (from {path} and the flags)"
        )
    try:
        built = parser.instantiate(parsed)
        return kind(**dict(vars(built)))
    except ValueError as error:
        raise UserError(f"{one_line(error)} (from {path} and the flags)") from None
