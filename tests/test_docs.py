"""The documents say what is true: commands parse, files and names they mention are there.

Runs no command: each `diccae` line of a code block goes through the parser it would meet.
"""

import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import tyro

from diccae.commands.store import StoreArgs
from diccae.config import RunConfig, load_config
from diccae.subcommands import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("[!.]*/README.md"), *ROOT.glob("docs/*.md")])
PACKAGES = ("pipeline", "clustering", "training", "deploy", "diccae")
TOPS = "|".join([*PACKAGES, "configs", "benchmarks", "tests", "docs"])

every_page = pytest.mark.parametrize(
    "page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix()
)


_COMMAND = r"^(?:diccae|python|make) .*"
"""Tables and pictures stand in blocks, too."""


def _blocks(text: str) -> list[tuple[str, str]]:
    """Language and content of each fenced block, lines put together that a backslash divides."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [(language, block.replace("\\\n", " ")) for language, block in found]


def _shell_lines(page: Path) -> Iterator[list[str]]:
    """The words of each command of a page's shell blocks."""
    for language, block in _blocks(page.read_text()):
        if language in ("", "sh"):
            for line in re.findall(_COMMAND, block, re.MULTILINE):
                if not _is_synopsis(line):
                    yield shlex.split(line, comments=True)


def _is_synopsis(line: str) -> bool:
    return "|" in line or "[" in line


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
    # The images hold the shipped configs there.
    command, *options = [word.replace("/app/configs/", "configs/") for word in words]
    assert command in COMMANDS, f"no command {command}"
    with pytest.raises(Parsed):
        importlib.import_module(f"diccae.commands.{command}").main(options)
    if "--" in options:
        _parse(options[options.index("--") + 1 :])


def _parse_on_top_of(config: RunConfig, words: list[str]) -> None:
    """As a command does that takes the config of the run which it goes on with."""
    command, *options = words
    importlib.import_module(f"diccae.commands.{command}").OPTIONS.parse(options, lambda _: config)


@every_page
def test_commands_of_the_documents_parse(page: Path, parsing_only: None) -> None:
    for words in _shell_lines(page):
        if words[0] == "diccae" and words[1:] != ["--help"]:
            _parse(words[1:])


@every_page
def test_commands_that_go_on_with_a_run_parse_whichever_of_the_pages_configs_it_has(
    page: Path,
) -> None:
    named = sorted(set(re.findall(r"configs/[\w-]+\.yaml", page.read_text())))
    for config in [load_config(ROOT / name) for name in named] or [RunConfig()]:
        for words in _shell_lines(page):
            if words[0] == "diccae" and words[1] in ("finetune", "evaluate"):
                _parse_on_top_of(config, words[1:])


@every_page
def test_no_command_of_the_documents_is_overlooked(page: Path) -> None:
    """A fence that is taken for its opposite would hide the commands after it."""
    text = page.read_text()
    assert len(re.findall(r"^ *```", text, re.MULTILINE)) == 2 * len(_blocks(text))
    lines = re.findall(r"^diccae .*", text, re.MULTILINE)
    commands = [line for line in lines if not _is_synopsis(line)]
    found = [words for words in _shell_lines(page) if words[0] == "diccae"]
    assert len(found) == len(commands)
    synopses = 2 if page == ROOT / "pipeline" / "README.md" else 0
    assert len(lines) - len(commands) == synopses


def test_commands_after_a_block_of_python_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\nimport csv\n```\n\n```sh\ndiccae report \\\n  --out o\n```\n")
    assert list(_shell_lines(page)) == [["diccae", "report", "--out", "o"]]


def test_the_synopsis_of_store_names_every_action() -> None:
    page = (ROOT / "pipeline" / "README.md").read_text()
    named = re.search(r"^diccae store +(.*?) --store", page, re.MULTILINE)
    assert named
    actions = get_args(get_type_hints(StoreArgs)["action"])
    assert tuple(named[1].split(" | ")) == actions


def test_a_wrong_option_would_be_found(parsing_only: None) -> None:
    with pytest.raises(SystemExit):
        _parse(shlex.split("pretrain --store a --out b --optim.lrr 1"))
    with pytest.raises(SystemExit):
        _parse_on_top_of(RunConfig(), shlex.split("finetune --out b --finetune.no-ballanced"))


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
