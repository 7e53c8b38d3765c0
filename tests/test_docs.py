"""The code that docs/ quotes is in the files, word for word, and every setting that the pages name exists."""

import dataclasses
import re
from textwrap import indent

import pytest

from tests.running import ROOT
from training.config import PlainTrainConfig
from training.deepspeed_config import DeepSpeedTrainConfig

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
GUIDES = [page for page in PAGES if page.name.startswith("from_")]
OPTIONS = {"key", "restarts"}  # of the launchers
OPTIONS |= {"to", "tokenizer"}  # of tools.convert
OPTIONS |= {"beside", "file"}  # of tools.benchmark and tools.evaluate
OPTIONS |= {"achievable", "curve", "device", "gpus", "model", "nodes", "overlap", "ranks"}  # of tools.plan
KEYS = {field.name for config in (PlainTrainConfig, DeepSpeedTrainConfig) for field in dataclasses.fields(config)}


def excerpts(text: str) -> list[tuple[str, str]]:
    """(first line, the rest) of every ```python block."""
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    return [tuple(block.split("\n", 1)) for block in blocks]


def missing(excerpt: str, source: str) -> str | None:
    """The first piece of an excerpt that the source lacks, or None. The source may be indented further."""
    pieces = [missing_piece(indent(excerpt, " " * spaces), source.splitlines()) for spaces in range(0, 20, 4)]
    return None if None in pieces else pieces[0]


def missing_piece(excerpt: str, lines: list[str]) -> str | None:
    """The first piece that is not in lines, consecutive and after the piece before it; `...` separates pieces."""
    start = 0
    for piece in re.split(r"^ *\.\.\.\n", excerpt, flags=re.M):
        expected = piece.splitlines()
        candidates = range(start, len(lines) - len(expected) + 1)
        place = next((first for first in candidates if lines[first : first + len(expected)] == expected), None)
        if place is None:
            return piece
        start = place + len(expected)
    return None


def columns(text: str) -> list[tuple[str, str]]:
    """(file, code) for every `code` in a table column that is headed by a file name such as `train.py`."""
    cells = []
    for table in re.findall(r"^(?:\|.*\n)+", text, re.M):
        head, _, *rows = [line.strip("|\n").split(" | ") for line in table.splitlines()]
        for number, name in enumerate(cell.strip(" `") for cell in head):
            if name.endswith(".py"):
                cells += [(name, code) for row in rows for code in re.findall("`([^`]+)`", row[number])]
    return cells


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.name)
def test_excerpts_are_in_the_code(guide):
    quoted = excerpts(guide.read_text())
    assert len(quoted) > 5, "too few excerpts for this test to mean anything"
    for head, rest in quoted:
        path = ROOT / head.removeprefix("# ")
        assert path.is_file(), f"{head}: must be the name of a file"
        piece = missing(rest, path.read_text())
        assert piece is None, f"{head} does not have\n{piece}"


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.name)
def test_tables_of_code_are_in_the_code(guide):
    for name, code in columns(guide.read_text()):
        lines = (ROOT / name).read_text().splitlines()
        assert any(code in line for line in lines), f"{name} does not have {code}"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_settings_exist(page):
    """The settings in running text that are written --key=value; tests/test_readme.py checks those of commands."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    assert not set(re.findall(r"`(?:\./launch_\w+.sh )?--(\w+)=", text)) - KEYS - OPTIONS


@pytest.mark.parametrize("excerpt", ["b\nd\n", "b\nc\n", "    c\n...\nb\n"])
def test_a_wrong_excerpt_is_reported(excerpt):
    source = "a\nb\n    c\nd\n"
    assert missing(excerpt, source) and not missing("a\n...\n    c\nd\n", source) and not missing("c\n", source)


def test_a_table_is_read():
    text = "| | `model.py` | other |\n|---|---|---|\n| x | `class GPT` and `torch` | `no` |\n"
    assert columns(text) == [("model.py", "class GPT"), ("model.py", "torch")]
