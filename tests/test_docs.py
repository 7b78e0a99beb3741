"""The documents say what is true: commands parse, files and names they mention are there.

Runs no command: each `diccae` line of a code block goes through the parser it would meet.
"""

import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tyro

from diccae.subcommands import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("[!.]*/README.md"), *ROOT.glob("docs/*.md")])
PACKAGES = ("pipeline", "clustering", "training", "deploy", "diccae")
TOPS = "|".join([*PACKAGES, "configs", "benchmarks", "tests", "docs"])

every_page = pytest.mark.parametrize(
    "page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix()
)


def _shell_lines(page: Path) -> Iterator[list[str]]:
    """The words of each command of a page's shell blocks."""
    for block in re.findall(r"^```(?:sh)?\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            # No prose has the first word of a command; tables and pictures stand in blocks, too.
            if re.match(r"(diccae|python|make) ", line) and "|" not in line and "[" not in line:
                yield shlex.split(line, comments=True)


class Parsed(BaseException):
    """Raised where a command would begin to work."""


@pytest.fixture
def parsing_only(monkeypatch: pytest.MonkeyPatch) -> None:
    real = tyro.cli

    def parse_and_stop(*args: Any, **kwargs: Any) -> None:
        real(*args, **kwargs)
        raise Parsed

    monkeypatch.setattr(tyro, "cli", parse_and_stop)
    monkeypatch.chdir(ROOT)


def _parse(words: list[str]) -> None:
    command, *options = words
    assert command in COMMANDS, f"no command {command}"
    with pytest.raises(Parsed):
        importlib.import_module(f"diccae.commands.{command}").main(options)
    if "--" in options:
        _parse(options[options.index("--") + 1 :])


@every_page
def test_commands_of_the_documents_parse(page: Path, parsing_only: None) -> None:
    for words in _shell_lines(page):
        if words[0] == "diccae" and words[1:] != ["--help"]:
            _parse(words[1:])


def test_a_wrong_option_would_be_found(parsing_only: None) -> None:
    assert sum(words[0] == "diccae" for page in PAGES for words in _shell_lines(page)) > 20
    with pytest.raises(SystemExit):
        _parse(shlex.split("pretrain --store a --out b --optim.lrr 1"))


@every_page
def test_scripts_and_targets_of_the_documents_are_there(page: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for words in _shell_lines(page):
        if words[0] == "make":
            assert set(words[1:2]) <= targets
        if words[0] == "python" and words[1].endswith(".py"):
            assert (ROOT / words[1]).exists(), words[1]


@every_page
def test_files_and_names_of_the_documents_are_there(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\((?!http)([^)#\s]+)", text):
        assert (page.parent / target).exists(), target
    for path, name in re.findall(rf"`((?:{TOPS})/[\w./-]*)(?::(\w+))?`", text):
        assert (ROOT / path).exists(), path
        if name:
            defined = rf"^\s*(def|class) {name}\b|^\s*{name}\b\s*[:=]"
            assert re.search(defined, (ROOT / path).read_text(), re.MULTILINE), f"{path}:{name}"


def test_code_refers_to_pages_and_headings_that_are_there() -> None:
    for path in (file for top in PACKAGES for file in (ROOT / top).rglob("*.py")):
        text = " ".join(path.read_text().split())
        assert "DESIGN" not in text, path
        for page, heading in re.findall(r"(docs/\w+\.md)(?:, \"([^\"]+)\")?", text):
            assert (ROOT / page).exists(), f"{path}: {page}"
            if heading:
                assert f"## {heading}" in (ROOT / page).read_text(), f"{path}: {heading}"
