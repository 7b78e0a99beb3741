"""Imports run one way, and files stay short enough to read."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("pipeline", "clustering", "training", "deploy", "diccae")
ALLOWED = {
    "pipeline": set(),
    "clustering": set(),
    "training": {"pipeline", "clustering"},
    "deploy": set(),
    "diccae": {"pipeline", "clustering", "training", "deploy"},
}


def _imported_packages(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module.split(".")[0])
    return found & set(PACKAGES)


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_run_one_way(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        wrong = _imported_packages(path) - ALLOWED[package] - {package}
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


@pytest.mark.parametrize("package", PACKAGES)
def test_files_are_short_and_say_what_they_do(package: str) -> None:
    for path in sorted((ROOT / package).rglob("*.py")):
        text = path.read_text()
        assert ast.get_docstring(ast.parse(text)), f"{path.relative_to(ROOT)} has no docstring"
        lines = text.count("\n")
        assert lines <= 400, f"{path.relative_to(ROOT)} has {lines} lines; split it"
