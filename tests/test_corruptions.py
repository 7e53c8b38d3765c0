"""What disks and copying do to files: each is named, and nothing of it is loaded."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import BYTES, run_folder
from tests.running import train, zero_json
from tools.convert import convert
from tools.convert_read import open_source
from training.checkpoint import FORMAT, METADATA, checksum
from training.errors import UserError
from training.model_state import WEIGHT, SavedState

EACH = 20
CONVERTED = {"run": "train", "ckpt.pt": "nanogpt", "w.safetensors": "safetensors", "hf": "hf"}
TRAINED = ("fsdp", "zero1", "zero2", "zero3")
WITHOUT_CHECKSUMS = ("w.safetensors", "hf")
KINDS = (*CONVERTED, *TRAINED, "universal")


@pytest.fixture(scope="module")
def kept(tmp_path_factory, data) -> Path:
    """A folder with one of each kind."""
    folder = tmp_path_factory.mktemp("kept")
    run_folder(folder / "source")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tools.convert.MAX_SHARD_BYTES", 50_000)
        for name, to in CONVERTED.items():
            convert(str(folder / "source"), folder / name, to)
    write_universal(folder / "source", folder / "universal")
    small: dict[str, Any] = {"ranks": 2, "gradient_accumulation_steps": 2, "max_iters": 2, "eval_iters": 1}
    for name in TRAINED:
        strategy = {"deepspeed_config": zero_json(name)} if "zero" in name else {"strategy": name}
        train(folder / name, data, **{**small, **strategy})
    return folder


def write_universal(source: Path, target: Path) -> None:
    """Write a universal checkpoint as earlier versions of tools.convert did: with checksums in checkpoint.json."""
    saved, metadata = open_source(str(source))
    for name in saved.shapes:
        (target / "zero" / name).mkdir(parents=True)
        for kind in (WEIGHT, *saved.kinds):
            file = target / "zero" / name / f"{'fp32' if kind == WEIGHT else kind}.pt"
            torch.save({"param": saved.whole(name, kind).clone()}, file)
    state = {"optimizer_state_dict": {"state": {0: {"step": torch.tensor(saved.step)}}}}
    torch.save(state, target / "zero" / "optimizer_state.pt")
    sums = {str(path.relative_to(target)): checksum(path) for path in target.rglob("*.pt")}
    sizes, crcs = ({name: entry[i] for name, entry in sums.items()} for i in range(2))
    files = {"files": sizes, "crc32": crcs}
    (target / METADATA).write_text(json.dumps({"format": FORMAT, "strategy": "universal", **metadata, **files}))


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
    ways: list[Callable[[list[Path], random.Random], list[Path]]] = [truncate, delete, swap] if inside else [truncate]
    ways += [flip] if source.name not in WITHOUT_CHECKSUMS else []
    way = ways[number % len(ways)]
    harmed = way(sorted(inside) or [source], chance)
    return harmed, f"{way.__name__} {', '.join(path.name for path in harmed)}"


def counts(path: Path) -> bool:
    """Whether it holds a part of the model state, or says what it is of.

    A Hugging Face folder's config.json is not among those: it is written by people, too.
    """
    return path.suffix == ".pt" or "safetensors" in path.name or path.name == "checkpoint.json"


@pytest.mark.parametrize("kind", KINDS)
def test_each_is_named_and_nothing_is_loaded(kept, tmp_path, kind):
    chance, before, harmless = random.Random(kind), open_source(str(kept / kind), BYTES)[0], []
    for number in range(EACH):
        copy = tmp_path / str(number) / kind
        copy.parent.mkdir()
        (shutil.copytree if (kept / kind).is_dir() else shutil.copy)(kept / kind, copy)
        harmed, what = harm(copy, number, chance)
        try:
            saved, _ = open_source(str(copy), BYTES)
        except UserError as error:
            assert any(path.name in str(error) for path in harmed), f"{what}: {error}"
        else:
            assert kind in ("ckpt.pt", "hf") and same(saved, before), f"{what}: was loaded"
            harmless += [what] if kind == "ckpt.pt" else []  # hf: shards that were swapped
    assert len(harmless) <= EACH // 10, harmless  # between the records of a zip file, there are bytes of no meaning


def same(one: SavedState, other: SavedState) -> bool:
    return all(torch.equal(one.whole(name, kind), other.whole(name, kind)) for name, kind in other.pieces)
