"""What disks and copying do to files: each is named, and nothing of it is loaded."""

import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import BYTES, run_folder
from tests.running import train, zero_json
from training.errors import UserError
from training.formats.conversion import convert
from training.formats.options import Options
from training.formats.source import open_source
from training.model_state import SavedState

OPTIONS = Options(ranks=3, tokenizer=BYTES)
EACH = 20
KINDS = {  # the format, and its options; None: a real run wrote it
    **{"run": ("train", {}), "zero1": ("deepspeed", {"stage": 1}), "zero3": ("deepspeed", {"stage": 3})},
    **{"u": ("universal", {}), "ckpt.pt": ("nanogpt", {}), "w.safetensors": ("safetensors", {})},
    **{"hf": ("hf", {"max_shard_size": 5e4}), "fsdp": None, "zero2": None},
}


@pytest.fixture(scope="module")
def kept(tmp_path_factory, data) -> Path:
    """A folder with one of each kind."""
    folder = tmp_path_factory.mktemp("kept")
    run_folder(folder / "source")
    for name, how in KINDS.items():
        if how:
            convert(str(folder / "source"), folder / name, how[0], replace(OPTIONS, verify="none", **how[1]))
    small: dict[str, Any] = {"ranks": 2, "gradient_accumulation_steps": 2, "max_iters": 2, "eval_iters": 1}
    train(folder / "fsdp", data, strategy="fsdp", **small)
    train(folder / "zero2", data, deepspeed_config=zero_json("zero2"), **small)
    return folder


def truncate(files: list[Path], chance: random.Random) -> list[Path]:
    path = chance.choice(files)
    path.write_bytes(path.read_bytes()[: chance.randrange(path.stat().st_size)])
    return [path]


def flip(files: list[Path], chance: random.Random) -> list[Path]:
    """A single bit."""
    path = chance.choice(files)
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)
    return [path]


def delete(files: list[Path], chance: random.Random) -> list[Path]:
    path = chance.choice(files)
    path.unlink()
    return [path]


def swap(files: list[Path], chance: random.Random) -> list[Path]:
    one, other = chance.sample(files, 2)
    if one.read_bytes() == other.read_bytes():
        return swap(files, chance)
    between = one.with_name("between")
    one.rename(between)
    other.rename(one)
    between.rename(other)
    return [one, other]


def harm(source: Path, number: int, chance: random.Random) -> tuple[list[Path], str]:
    """What was harmed of a copy, and how."""
    inside = [path for path in source.rglob("*") if path.is_file() and counts(path)]
    ways: list[Callable[[list[Path], random.Random], list[Path]]] = [truncate, flip, delete, swap]
    way = ways[number % 4] if inside else (truncate, flip)[number % 2]
    harmed = way(sorted(inside) or [source], chance)
    return harmed, f"{way.__name__} {', '.join(path.name for path in harmed)}"


def counts(path: Path) -> bool:
    """Whether it holds a part of the model state, or says what it is of.

    A Hugging Face folder's config.json is not among those: it is written by people, too.
    """
    return path.suffix == ".pt" or "safetensors" in path.name or path.name == "checkpoint.json"


@pytest.mark.parametrize("kind", KINDS)
def test_each_is_named_and_nothing_is_loaded(kept, tmp_path, kind):
    chance, before, harmless = random.Random(kind), open_source(str(kept / kind), OPTIONS)[0], []
    for number in range(EACH):
        copy = tmp_path / str(number) / kind
        copy.parent.mkdir()
        (shutil.copytree if (kept / kind).is_dir() else shutil.copy)(kept / kind, copy)
        harmed, what = harm(copy, number, chance)
        try:
            saved, _ = open_source(str(copy), OPTIONS)
        except UserError as error:
            assert any(path.name in str(error) for path in harmed), f"{what}: {error}"
        else:
            assert kind == "ckpt.pt" and same(saved, before), f"{what}: was loaded"
            harmless.append(what)
    assert len(harmless) <= EACH // 10, harmless  # between the records of a zip file, there are bytes of no meaning


def same(one: SavedState, other: SavedState) -> bool:
    return all(torch.equal(one.whole(name, kind), other.whole(name, kind)) for name, kind in other.pieces)
