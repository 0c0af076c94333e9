"""The structure of the tree: layers, cycles, sizes of files, names, and what packages say of themselves."""

import ast
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGES = ("telltale", "launch", "engines", "models", "dataio")
LONGEST = 400  # lines of a file
HEAVY = ("torch", "pandas", "nvidia", "transformers", "deepspeed", "sklearn", "matplotlib")

# Names that two modules define, with the reason why that is one meaning, or no harm.
SAME_NAME = {
    "GROUPS": "each cases module of the benchmark lists its groups; the registry merges them",
    "FORMAT": "each file format has its own name",
    "VERSION": "each file format has its own version",
    "SECTION": "each file of engines/evaluate/sections declares one",
    "SCHEMA": "each table or JSON document has its own schema",
    "DEFAULT_VAL_FRACTION": "each layout has its own default",
    "GENERATORS": "each layout knows its own generators",
    "labels_of_name": "each layout reads labels out of its own file names",
    "load": "telltale.load is the front door; checkpoint.files loads a file; a benchmark group is named after its work",
    "evaluate": "telltale.evaluate is the front door; a benchmark group is named after its work",
}


# Phrases of an older dialect of these pages, and the plain words for them.
WORDING = {
    r"mend(s|ed|ing)?": "fix, repair",
    r"told (from|of|apart)": "distinguished, separated",
    r"said in one line": "a one-line message",
    r"turn about": "interleaved",
    r"dies of": "crashes on",
    r"what is there": "existing files",
    r"is no (list|count|number|string)": "must be a list",
    r"said of": "reported for",
}


def _python_files(root: Path) -> list[Path]:
    folders = [*PACKAGES, "tests"]
    return sorted(file for folder in folders for file in (root / folder).rglob("*.py"))


def test_the_import_contract_holds(repo_root):
    program = shutil.which("lint-imports", path=str(Path(sys.executable).parent))
    if program is None:
        pytest.skip("lint-imports is not installed: pip install import-linter, or make venv")
    done = subprocess.run([program, "--no-cache"], cwd=repo_root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_module_imports_itself_by_way_of_others(repo_root, monkeypatch):
    grimp = pytest.importorskip("grimp", reason="grimp is not installed: pip install import-linter")
    monkeypatch.syspath_prepend(str(repo_root))
    graph = grimp.build_graph(*PACKAGES, cache_dir=None)
    edges = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    assert len(edges) > 150 and sum(map(len, edges.values())) > 500
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        pytest.fail(" imported by ".join(error.args[1]))


def test_files_are_short_and_named_after_their_subject(repo_root):
    files = _python_files(repo_root)
    lengths = {str(file.relative_to(repo_root)): len(file.read_text().splitlines()) for file in files}
    assert len(lengths) > 300
    long = {name: length for name, length in lengths.items() if length > LONGEST}
    assert {name: length for name, length in long.items()} == {}
    assert [
        name for name in lengths if Path(name).stem in ("utils", "util", "helpers", "common", "misc")
    ] == []


def test_prose_uses_plain_words(repo_root):
    pattern = re.compile(rf"\b({'|'.join(WORDING)})\b", re.IGNORECASE)
    pages = [
        file
        for end in ("*.md", "*.cff")
        for file in (*repo_root.glob(end), *repo_root.glob(f"docs/**/{end}"))
    ]
    files = [
        *_python_files(repo_root),
        *pages,
        *repo_root.glob("slurm/*"),
        *repo_root.glob("configs/**/*.yaml"),
    ]
    assert len(files) > 400
    hits = [
        f"{file.relative_to(repo_root)}:{number}: {line.strip()}"
        for file in files
        if file != Path(__file__)
        for number, line in enumerate(file.read_text().splitlines(), start=1)
        if pattern.search(line)
    ]
    assert hits == []


def _public_names(file: Path) -> set[str]:
    """Classes, functions and constants that a module defines, without a leading underscore."""
    names: set[str] = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {
                leaf.id for target in targets for leaf in ast.walk(target) if isinstance(leaf, ast.Name)
            }
    return {name for name in names if not name.startswith("_")}


def test_the_library_logs_and_does_not_print(repo_root):
    # Exit lines and errors of commands; a command's own product, row by row; the benchmark's tables.
    printing = {
        "dataio/core/log.py",
        "engines/runtime/command.py",
        "engines/predict/predict.py",
        "engines/benchmark/session.py",
    }
    for package in ("dataio", "models", "engines"):
        for file in (repo_root / package).rglob("*.py"):
            name = file.relative_to(repo_root).as_posix()
            calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
            prints = [c.lineno for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"]
            assert not prints or name in printing, f"{name}:{prints[0]}: use dataio.core.log"


def test_a_public_name_has_one_meaning(repo_root):
    places = defaultdict(list)
    for package in PACKAGES:
        if package != "launch":  # each command has a main
            for file in sorted((repo_root / package).rglob("*.py")):
                for name in _public_names(file):
                    places[name].append(str(file.relative_to(repo_root)))
    assert len(places) > 500
    twice = {name: files for name, files in places.items() if len(files) > 1}
    assert {name: files for name, files in twice.items() if name not in SAME_NAME} == {}
    assert SAME_NAME.keys() - twice.keys() == set()  # a name that is unique again needs no reason


def test_packages_introduce_themselves_and_import_nothing_heavy(repo_root):
    inits = [file for package in PACKAGES for file in (repo_root / package).rglob("__init__.py")]
    texts = {
        str(file.relative_to(repo_root)): ast.get_docstring(ast.parse(file.read_text())) for file in inits
    }
    assert len(texts) > 30
    assert [name for name, text in texts.items() if len((text or "").split()) < 8] == []
    modules = [".".join(file.parent.relative_to(repo_root).parts) for file in inits]
    program = (
        "import importlib, sys\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=repo_root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
