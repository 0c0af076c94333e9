"""Pages that mkdocs generates from the code: commands, configuration, configs, API, packages.

mkdocs calls `on_files` once per build (`hooks:` in mkdocs.yml). Nothing here is written to
the source tree.
"""

import argparse
import ast
import importlib
import inspect
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
CONFIGURATIONS = (
    ("Detector", "`launch/train.py`, `telltale train`", "engines.config.detector", "Config"),
    ("TinyLLaVA", "`launch/finetune_mlm.py`, `telltale finetune`", "engines.config.mlm", "FinetuneConfig"),
    ("Protocols", "`launch/protocol.py`, `telltale protocol`", "engines.config.protocol", "ProtocolConfig"),
)
COPIES = {"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages to the site."""
    # mkdocs restores the path that it had before it loaded this file.
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    pages = {
        "reference/commands.md": commands_page,
        "reference/configuration.md": configuration_page,
        "reference/configs.md": configs_page,
        "reference/api.md": api_page,
        "reference/packages.md": packages_page,
    }
    for uri, page in pages.items():
        files.append(File.generated(config, uri, content=page()))
    for uri, source in COPIES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, uri, content=text.replace("](docs/", "](")))
    return files


# --- commands


def commands_page() -> str:
    """Every command with its flags, from the parsers."""
    from telltale.cli import COMMANDS

    parts = [
        "# Commands",
        "",
        "`telltale NAME` is `python launch/NAME.py` (`telltale finetune` is `launch/finetune_mlm.py`). "
        "All exit with 0 for success, 2 for a user error (a message of one line), and 75 for "
        "interrupted: run the same command again and it resumes.",
        "",
        "| command | what it does |",
        "|---|---|",
    ]
    commands = [(name, *rest) for group in COMMANDS.values() for name, rest in group.items()]
    parts += [f"| [`{name}`](#{name}) | {text} |" for name, _, text in commands]
    for name, file, _ in commands:
        module = importlib.import_module(f"launch.{file}")
        text = _docstring(module.__doc__ or "").replace(f"python launch/{file}.py", f"telltale {name}")
        parts += ["", f"## {name}", "", f"`telltale {name}`, `launch/{file}.py`", "", text, ""]
        parts += _flags(module.make_parser())
    return "\n".join(parts)


def _docstring(text: str, language: str = "bash") -> str:
    """Prose as it is; paragraphs that are indented become a block of code."""
    lines: list[str] = []
    for block in inspect.cleandoc(text).split("\n\n"):
        if block.startswith("    "):
            code = textwrap.dedent(block)
            if lines[-2:] == ["```", ""]:
                lines[-2:] = ["", code, "```", ""]
            else:
                lines += [f"```{language}", code, "```", ""]
        elif ":\n  " in block:
            first, names = block.split("\n", 1)
            lines += [first, "", *(f"* {line}" for line in textwrap.dedent(names).splitlines()), ""]
        else:
            lines += [block, ""]
    return "\n".join(lines)


def _flags(parser: argparse.ArgumentParser) -> list[str]:
    lines: list[str] = []
    configured = any(type(action).__name__ == "_ActionConfigLoad" for action in parser._actions)
    if configured:
        lines += ["Every key of the [configuration](configuration.md) is a flag too.", ""]
    for group in parser._action_groups:
        rows = [row for action in group._group_actions if (row := _flag_row(action, configured))]
        if not rows:
            continue
        title = (group.title or "options").strip()
        if title not in ("options", "optional arguments"):
            lines += [f"**{_cell(title)}**", ""]
        lines += ["| flag | default | meaning |", "|---|---|---|", *rows, ""]
    return lines


def _flag_row(action: argparse.Action, configured: bool) -> str:
    """A row of the table; empty for --help and for keys of a configuration, which has its own page."""
    flags = [flag for flag in action.option_strings if not flag.endswith("+")]
    if "--help" in flags or "--print_config" in flags or action.help == argparse.SUPPRESS:
        return ""
    if configured and (type(action).__name__ == "_ActionConfigLoad" or any("." in flag for flag in flags)):
        return ""
    name = ", ".join(f"`{flag}`" for flag in flags) or f"`{str(action.metavar or action.dest).upper()}`"
    choices = "" if not action.choices else "one of " + ", ".join(f"`{choice}`" for choice in action.choices)
    meaning = "; ".join(part for part in (_cell(action.help or ""), choices) if part)
    default = action.default
    if isinstance(default, list | tuple):
        default = " ".join(map(str, default))
    hidden = default is None or default is False or default in ("", argparse.SUPPRESS)
    shown = "" if hidden else f"`{_cell(str(default))}`"
    return f"| {name} | {shown} | {meaning} |"


def _cell(text: str) -> str:
    return " ".join(text.replace("%%", "%").split()).replace("|", "\\|").replace("<", "&lt;")


# --- configuration


@dataclass(frozen=True)
class Key:
    """One key of a configuration: its dotted name, type, default and description."""

    name: str
    type: str
    default: str
    meaning: str


def keys_of(kind: type, prefix: str = "") -> Iterator[Key]:
    """The keys of a configuration class that are values, nested ones with dots."""
    hints = get_type_hints(kind)
    texts, types = _documented_fields(kind)
    for item in fields(kind):
        name = f"{prefix}{item.name}"
        if is_dataclass(hints[item.name]):
            continue
        if item.default is not MISSING:
            default: Any = item.default
        elif item.default_factory is not MISSING:
            default = item.default_factory()
        else:
            default = "required"
        shown = (default or '""') if isinstance(default, str) else repr(default)
        yield Key(name, types.get(item.name, ""), shown, texts.get(item.name, ""))


def _documented_fields(kind: type) -> tuple[dict[str, str], dict[str, str]]:
    """Docstrings and annotations of a class's fields, those of its base classes too."""
    texts: dict[str, str] = {}
    types: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        tree = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(tree, ast.ClassDef)
        for node, after in zip(tree.body, [*tree.body[1:], None], strict=True):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                types[node.target.id] = ast.unparse(node.annotation)
                if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                    texts[node.target.id] = " ".join(str(after.value.value).split())
    return texts, types


def _sections(kind: type, prefix: str = "") -> Iterator[tuple[str, type]]:
    yield prefix, kind
    for name, hint in get_type_hints(kind).items():
        if isinstance(hint, type) and is_dataclass(hint):
            yield from _sections(hint, f"{prefix}{name}.")


def configuration_page() -> str:
    """Every key of every configuration, from the dataclasses."""
    parts = [
        "# Configuration",
        "",
        "A YAML file in `configs/` states what an experiment changes; any key can be overridden on the "
        "command line (`--optim.lr 0.05`). Unknown keys and values out of range are errors.",
        "",
    ]
    for title, command, module, name in CONFIGURATIONS:
        kind = getattr(importlib.import_module(module), name)
        parts += [f"## {title}", "", f"For {command}; class `{module}.{name}`.", ""]
        for prefix, section in _sections(kind):
            rows = [
                f"| `{key.name}` | `{_cell(key.type)}` | `{_cell(key.default)}` | {_cell(key.meaning)} |"
                for key in keys_of(section, prefix)
            ]
            if not rows:
                continue
            if prefix:
                about = inspect.cleandoc(section.__doc__ or "").split("\n\n")[0]
                parts += [f"### {prefix.rstrip('.')}", "", about, ""]
            parts += ["| key | type | default | meaning |", "|---|---|---|---|", *rows, ""]
    return "\n".join(parts)


# --- shipped configurations


def configs_page() -> str:
    """The header comment of every YAML file in configs/."""
    parts = [
        "# Shipped configurations",
        "",
        "What each file of `configs/` is for, what to expect of it and how to run it: its header comment.",
        "",
    ]
    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        lines: list[str] = []
        for line in path.read_text(encoding="utf-8").splitlines():
            if not line.startswith("#"):
                break
            lines.append(line.removeprefix("#").removeprefix(" "))
        parts += [f"## {path.relative_to(ROOT / 'configs')}", "", "```text", *lines, "```", ""]
    return "\n".join(parts)


# --- API


def api_page() -> str:
    """The package `telltale`, as its docstrings describe it; names in the order of the package's docstring."""
    path = ROOT / "telltale" / "__init__.py"
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    names = sorted(_public_names(path), key=lambda name: text.find(f"`{name}`"))
    parts = ["# Python API", "", _docstring(text, "python"), ""]
    parts += [f"::: telltale.{name}\n" for name in names]
    return "\n".join(parts)


def _public_names(path: Path) -> list[str]:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and any(
            isinstance(target, ast.Name) and target.id == "__all__" for target in node.targets
        ):
            return [name for name in ast.literal_eval(node.value) if not name.startswith("_")]
    raise ValueError(f"{path}: expected __all__")


def packages_page() -> str:
    """The docstring of each package, which lists its public names."""
    parts = [
        "# Packages",
        "",
        "What lives in each package, and its public names: the docstrings of the packages' `__init__.py`. "
        "[Architecture](../architecture.md) says which may import which.",
        "",
    ]
    for path in sorted(ROOT.glob("*/**/__init__.py")):
        package = ".".join(path.relative_to(ROOT).parent.parts)
        if package.split(".")[0] not in ("dataio", "models", "engines", "telltale"):
            continue
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        if len(text) > 3:
            parts += [f"## {package}", "", _docstring(text), ""]
    return "\n".join(parts)
