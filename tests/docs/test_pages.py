"""README and docs/: links, paths and commands exist; generated pages and the figure are complete."""

import re
import subprocess
import sys
from dataclasses import fields
from functools import cache
from importlib import import_module
from types import ModuleType

import pytest

from engines.config.detector import Config
from telltale.cli import COMMANDS
from tests.docs.pages import ROOT, blocks

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
# Written by docs/hooks.py when the site is built.
GENERATED = {
    "changelog.md",
    "contributing.md",
    "reference/api.md",
    "reference/commands.md",
    "reference/configs.md",
    "reference/configuration.md",
    "reference/packages.md",
}
# The log is a record: an entry keeps the paths of its day.
CURRENT = [page for page in PAGES if page.name != "log.md"]
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_PATH = re.compile(
    r"(?<![\w/.{-])(?:launch|configs|slurm|docs|dataio|engines|models|telltale|tests)/[\w./-]*\.\w+"
)
_FIGURES = [ROOT / "docs" / "figures" / "architecture.py"]


def name(page):
    return str(page.relative_to(ROOT))


@cache
def hooks() -> ModuleType:
    pytest.importorskip("mkdocs", reason="the documentation's packages are not installed")
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("telltale_docs_hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def titles_of_blocks() -> set[str]:
    """Files that a how-to page tells the reader to write."""
    pages = (page.relative_to(ROOT / "docs") for page in PAGES if page.parent.name == "howto")
    return {title for page in pages for _, title, _ in blocks(str(page)) if title}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    broken = []
    for target in _LINK.findall(page.read_text(encoding="utf-8")):
        path, _, _ = target.partition("#")
        # GitHub's own pages, above the repository.
        if not path or re.match(r"\w+:", path) or path.startswith("../../actions/"):
            continue
        place = (page.parent / path).resolve()
        generated = place.is_relative_to(ROOT / "docs") and str(place.relative_to(ROOT / "docs")) in GENERATED
        if not generated and not place.exists():
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("page", CURRENT, ids=name)
def test_paths_in_text_exist(page):
    paths = {path.rstrip(".") for path in _PATH.findall(page.read_text(encoding="utf-8"))}
    paths = {path for path in paths - titles_of_blocks() if "NAME" not in path}
    # reliability.md names tests from tests/ on.
    missing = {path for path in paths if not (ROOT / path).exists() and not (ROOT / "tests" / path).exists()}
    # Written by the user (and ignored by git), or by a run.
    assert missing - {"slurm/site.env", "slurm/status.txt"} == set()


@pytest.mark.parametrize("page", CURRENT, ids=name)
def test_commands_exist(page):
    text = page.read_text(encoding="utf-8")
    commands = set(re.findall(r"^telltale ([a-z][\w-]*)", "\n".join(shell_lines(text)), re.MULTILINE))
    commands |= set(re.findall(r"`telltale ([a-z][\w-]*)[^`]*`", text))
    assert commands <= set(modules())
    targets = set(re.findall(r"^make ([\w-]+)", "\n".join(shell_lines(text)), re.MULTILINE))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert [target for target in targets if f"\n{target}:" not in makefile] == []


@pytest.mark.parametrize("page", CURRENT, ids=name)
def test_flags_exist(page):
    """Every flag of every telltale command in a shell block is one of the command's parser."""
    unknown = []
    for line in shell_lines(page.read_text(encoding="utf-8").replace("\\\n", " ")):
        match = re.search(r"(?:telltale ([a-z-]+)|launch/([a-z_]+)\.py)(.*)", line)
        command = match and next((c for c, m in modules().items() if match[1] == c or match[2] == m), None)
        if match and command:
            known = {flag.replace("-", "_") for flag in flags_of(command)}
            flags = re.findall(r"(?<=\s)--[a-z][\w.-]*", match[3])
            unknown += [f"{command} {flag}" for flag in flags if flag.replace("-", "_") not in known]
    assert unknown == []


@cache
def flags_of(command: str) -> list[str]:
    parser = import_module(f"launch.{modules()[command]}").make_parser()
    return [flag for action in parser._actions for flag in action.option_strings]


def modules() -> dict[str, str]:
    """The module of launch/ of each command of `telltale`."""
    return {name: module for group in COMMANDS.values() for name, (module, _) in group.items()}


def shell_lines(text: str) -> list[str]:
    found = re.findall(r"^```bash[^\n]*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [line for block in found for line in block.splitlines()]


def test_readme_is_a_page():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("script", _FIGURES, ids=name)
def test_figures_are_up_to_date(script):
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_images_are_small():
    large = [path.name for path in (ROOT / "docs" / "assets").iterdir() if path.stat().st_size > 300_000]
    assert large == []


def test_configuration_reference_has_every_key_with_its_description():
    page = hooks().configuration_page()
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert [row for row in rows if row.endswith("|  |")] == []
    for section in fields(Config):
        for key in (
            fields(section.type) if isinstance(section.type, type) and section.name != "resume" else ()
        ):
            assert f"`{section.name}.{key.name}" in page
    assert "| `optim.lr` | `float` | `0.1` | Peak learning rate. |" in page


def test_command_reference_has_every_command_and_its_flags():
    page = hooks().commands_page()
    for path in (ROOT / "launch").glob("[a-z]*.py"):
        assert f"launch/{path.name}" in page
    assert "`--samples-per-shard`" in page and "`--held-out`" in page


def test_config_reference_has_every_file():
    page = hooks().configs_page()
    for path in (ROOT / "configs").rglob("*.yaml"):
        assert f"## {path.relative_to(ROOT / 'configs')}\n" in page
