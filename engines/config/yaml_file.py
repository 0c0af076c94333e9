"""What a configuration's YAML file must be before the parser sees it."""

from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from dataio.core.errors import UserError


def check_config_file(path: Path, kind: type) -> None:
    """Refuse what the parser cannot handle: aliases (a loop of them hangs it) and anything but a tree of keys.

    Raises:
        UserError: the file is not a tree of keys, has aliases, a plain value in place of a section, or
            on or off, unquoted, where the key takes these words.
    """
    try:
        text = path.read_text(encoding="utf-8")
        aliases = [e for e in yaml.parse(text, yaml.SafeLoader) if isinstance(e, yaml.AliasEvent)]
        if aliases:
            line = aliases[0].start_mark.line + 1
            raise UserError(f"{path}: line {line}: an alias (*{aliases[0].anchor}); write the value out")
        tree = yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read as YAML ({' '.join(str(error).split())[:200]})") from None
    if tree is not None and not _is_tree_of_keys(tree):
        raise UserError(
            f"{path}: expected keys and values, such as `optim: {{lr: 0.1}}`, with strings as keys"
        )
    switch = _unquoted_switch(kind, tree or {}, "")
    if switch:
        raise UserError(f"{path}: {switch}, which YAML reads as true or false; put it in quotes")
    bare = _bare_section(kind, tree or {}, "")
    if bare:
        raise UserError(f"{path}: {bare} must be a section: give keys below it, or leave it out")


def _is_tree_of_keys(tree: Any) -> bool:
    if not isinstance(tree, dict):
        return False
    inner = (value for value in tree.values() if isinstance(value, dict))
    return all(isinstance(key, str) for key in tree) and all(map(_is_tree_of_keys, inner))


def _unquoted_switch(kind: type, tree: dict[str, Any], prefix: str) -> str:
    """The first key that takes the word on or off and has a truth value, "" if there is none."""
    types = get_type_hints(kind)
    for name, value in tree.items():
        entry = types.get(name)
        if isinstance(value, bool) and get_origin(entry) is Literal and "off" in get_args(entry):
            return f"{prefix}{name} is {'on' if value else 'off'} without quotes"
        if isinstance(value, dict) and is_dataclass(entry):
            found = _unquoted_switch(entry, value, f"{prefix}{name}.")  # type: ignore[arg-type]
            if found:
                return found
    return ""


def _bare_section(kind: type, tree: dict[str, Any], prefix: str) -> str:
    """The first section of a configuration that holds no keys, "" if there is none."""
    for entry in fields(kind):
        section: Any = entry.default_factory
        if entry.name in tree and isinstance(section, type) and is_dataclass(section):
            inner, name = tree[entry.name], f"{prefix}{entry.name}"
            bare = _bare_section(section, inner, f"{name}.") if isinstance(inner, dict) else name
            if bare:
                return bare
    return ""
