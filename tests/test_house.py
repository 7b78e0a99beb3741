"""The house rules: which way imports run, where Ray may be, how large a room, file, function is.

Reads the source of the five packages, imports none of it.
"""

import ast
import functools
import itertools
import re
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ALLOWED = {
    "pipeline": set(),
    "clustering": {"pipeline.storage", "pipeline.patience", "pipeline.passwords"},
    "training": {"pipeline", "clustering"},
    "deploy": set(),
    "diccae": {"pipeline", "clustering", "training", "deploy"},
}
"""A package: what it may import beside itself, whole packages or single files of one."""
RAY = ("clustering/pool/", "training/on_ray/", "pipeline/ingest/on_ray.py", "deploy/", "diccae/")
"""Everything else can be read, tested and run without a cluster."""
ONE_FILE_A_COMMAND = "diccae/commands"

TOP = {
    *ALLOWED,
    *("CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md"),
    *("benchmarks", "configs", "constraints.txt", "docs", "pyproject.toml", "tests"),
}
"""What lies at the top of the project, hidden files aside."""

MAX_FILES, MAX_LINES, MAX_FUNCTION_LINES = 12, 400, 40

Function = ast.FunctionDef | ast.AsyncFunctionDef

every_package = pytest.mark.parametrize("package", ALLOWED)


@functools.cache
def _files(package: str) -> dict[str, ast.Module]:
    """Path below the root: syntax tree."""
    paths = sorted((ROOT / package).rglob("*.py"))
    return {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in paths}


def _imports(tree: ast.Module) -> Iterator[str]:
    """Dotted names imported anywhere in a file, in functions and under TYPE_CHECKING, too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _functions(package: str) -> Iterator[tuple[str, Function]]:
    for path, tree in _files(package).items():
        for node in ast.walk(tree):
            if isinstance(node, Function):
                yield f"{path}:{node.lineno} {node.name}", node


def _room(dotted: str) -> str | None:
    """The folder that holds what is imported; None if it is not ours."""
    parts = dotted.split(".")
    if parts[0] not in ALLOWED:
        return None
    while not (ROOT / "/".join(parts)).is_dir():
        parts.pop()
    return "/".join(parts)


@every_package
def test_imports_run_one_way(package: str) -> None:
    assert _files(package)
    allowed = ALLOWED[package] | {package}
    wrong = [
        f"{path} imports {name}"
        for path, tree in _files(package).items()
        for name in _imports(tree)
        if name.split(".")[0] in ALLOWED
        and not any(f"{name}.".startswith(f"{a}.") for a in allowed)
    ]
    assert wrong == []


@every_package
def test_ray_is_imported_at_the_edge_only(package: str) -> None:
    wrong = [
        path
        for path, tree in _files(package).items()
        if not path.startswith(RAY) and any(n.split(".")[0] == "ray" for n in _imports(tree))
    ]
    assert wrong == []


@every_package
def test_rooms_import_each_other_in_no_circle(package: str) -> None:
    below: dict[str, set[str]] = defaultdict(set)
    for path, tree in _files(package).items():
        here = str(Path(path).parent)
        below[here] |= {room for name in _imports(tree) if (room := _room(name))} - {here}
    # Rooms that import nothing more are taken away until none is left, or a circle.
    while free := [room for room, wants in below.items() if not wants & below.keys()]:
        for room in free:
            del below[room]
    circle = {room: sorted(wants & below.keys()) for room, wants in below.items()}
    assert circle == {}


def test_the_design_shows_what_the_rooms_of_training_build_on() -> None:
    page = (ROOT / "docs" / "design.md").read_text()
    graph = page.partition("rooms build on each other in one direction:\n\n```\n")[2]
    below: dict[str, set[str]] = defaultdict(set)
    for chain in re.split(r"\n| {4}", graph.partition("\n```")[0]):
        for lower, upper in itertools.pairwise(chain.split(" <- ")):
            for room in upper.split(", "):
                below[room] |= set(lower.split(", "))
    for between in [*below]:
        for room in below:
            below[room] |= below[between] if between in below[room] else set()
    imports = [
        (Path(path).parts[1:-1][:1], Path(room).parts[1:2], f"{path} imports {name}")
        for path, tree in _files("training").items()
        for name in _imports(tree)
        if (room := _room(name)) and room.startswith("training/")
    ]
    assert [
        said
        for here, there, said in imports
        if here and here != there and there[0] not in below[here[0]]
    ] == []


@every_package
def test_a_room_holds_a_dozen_files(package: str) -> None:
    rooms: dict[str, int] = defaultdict(int)
    for path in _files(package):
        rooms[str(Path(path).parent)] += Path(path).name != "__init__.py"
    rooms.pop(ONE_FILE_A_COMMAND, None)
    assert {room: n for room, n in rooms.items() if n > MAX_FILES} == {}


@every_package
def test_files_are_short_and_say_what_they_are(package: str) -> None:
    undocumented = [path for path, tree in _files(package).items() if not ast.get_docstring(tree)]
    lines = {path: (ROOT / path).read_text().count("\n") for path in _files(package)}
    assert undocumented == []
    assert {path: n for path, n in lines.items() if n > MAX_LINES} == {}


def test_no_two_files_open_with_the_same_sentence() -> None:
    files: dict[str, list[str]] = defaultdict(list)
    for package in ALLOWED:
        for path, tree in _files(package).items():
            first = (ast.get_docstring(tree) or path).split("\n\n")[0].split(". ")[0]
            files[" ".join(first.split()).rstrip(".").lower()].append(path)
    assert [paths for paths in files.values() if len(paths) > 1] == []


@every_package
def test_functions_are_short(package: str) -> None:
    lengths = {
        name: (node.end_lineno or node.lineno) - node.lineno + 1
        for name, node in _functions(package)
    }
    assert {name: n for name, n in lengths.items() if n > MAX_FUNCTION_LINES} == {}


def test_tests_lie_as_the_rooms_do() -> None:
    tests = ROOT / "tests"
    homeless = [
        path.relative_to(ROOT).as_posix()
        for path in sorted(tests.rglob("test_*.py"))
        if path.parent != tests and not any((ROOT / path.parent.relative_to(tests)).glob("*.py"))
    ]
    assert homeless == []


def test_nothing_lies_at_the_top_that_a_command_may_have_left_there() -> None:
    """A refusal that is tested in the working folder leaves a run there on the day it fails."""
    if not (ROOT / ".git").exists():
        pytest.skip("no checkout of git: what belongs to the project is not known")
    listed = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()
    names = {name.partition("/")[0] for name in listed if (ROOT / name).exists()}
    assert {name for name in names if not name.startswith(".")} == TOP
