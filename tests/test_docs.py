"""The guides of docs/ cannot drift: what they quote of this code is there, word for word, and so is every key."""

import dataclasses
import re
from pathlib import Path
from textwrap import indent

import pytest

from tests.running import ROOT
from training.deepspeed_config import DeepSpeedTrainConfig
from training.sharding import PlainTrainConfig

GUIDES = sorted((ROOT / "docs").glob("*.md"))
YOURS = "# yours"  # the first line of code that a reader comes with, not ours
KEYS = {field.name for config in (PlainTrainConfig, DeepSpeedTrainConfig) for field in dataclasses.fields(config)}


def excerpts(text: str) -> list[tuple[str, str]]:
    """(first line, the rest) of every ```python block."""
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    return [tuple(block.split("\n", 1)) for block in blocks]


def missing(excerpt: str, source: str) -> str | None:
    """What of an excerpt is not in the source, whose lines may all be indented further; None where it is there."""
    pieces = [gap(indent(excerpt, " " * deeper), source.splitlines()) for deeper in range(0, 20, 4)]
    return None if None in pieces else pieces[0]


def gap(excerpt: str, lines: list[str]) -> str | None:
    """The first piece that does not stand after the one before it, as consecutive lines; `...` is between pieces."""
    at = 0
    for piece in re.split(r"^ *\.\.\.\n", excerpt, flags=re.M):
        wanted = piece.splitlines()
        starts = range(at, len(lines) - len(wanted) + 1)
        found = next((first for first in starts if lines[first : first + len(wanted)] == wanted), None)
        if found is None:
            return piece
        at = found + len(wanted)
    return None


def columns(text: str) -> list[tuple[str, str]]:
    """(file, code) of every `code` in a table's column whose head is the name of a file, as `train.py`."""
    found = []
    for table in re.findall(r"^(?:\|.*\n)+", text, re.M):
        head, _, *rows = [line.strip("|\n").split(" | ") for line in table.splitlines()]
        for number, name in enumerate(cell.strip(" `") for cell in head):
            if name.endswith(".py"):
                found += [(name, code) for row in rows for code in re.findall("`([^`]+)`", row[number])]
    return found


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.name)
def test_excerpts_stand_in_the_code(guide):
    quoted = [(head, rest) for head, rest in excerpts(guide.read_text()) if head != YOURS]
    assert len(quoted) > 5, "too few excerpts: this test would test nothing"
    for head, rest in quoted:
        path = ROOT / head.removeprefix("# ")
        assert path.is_file(), f"{head}: must be {YOURS} or the name of a file"
        piece = missing(rest, path.read_text())
        assert piece is None, f"{head} does not have\n{piece}"


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.name)
def test_tables_stand_in_the_code(guide):
    for name, code in columns(guide.read_text()):
        lines = (ROOT / name).read_text().splitlines()
        assert any(code in line for line in lines), f"{name} does not have {code}"


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.name)
def test_keys_are_there(guide):
    """The keys of the train scripts in running text; those of commands are tried by tests/test_readme.py."""
    text = re.sub(r"^```.*?^```", "", guide.read_text(), flags=re.M | re.S)
    assert not set(re.findall(r"`--(\w+)=", text)) - KEYS


@pytest.mark.parametrize("excerpt", ["b\nd\n", "b\nc\n", "    c\n...\nb\n"])
def test_a_wrong_excerpt_is_found(excerpt):
    source = "a\nb\n    c\nd\n"
    assert missing(excerpt, source) and not missing("a\n...\n    c\nd\n", source) and not missing("c\n", source)


def test_a_table_is_read():
    text = "| | `model.py` | other |\n|---|---|---|\n| x | `class GPT` and `torch` | `no` |\n"
    assert columns(text) == [("model.py", "class GPT"), ("model.py", "torch")]
    assert Path(ROOT / "model.py").is_file()
