"""What several tests need."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from tests import cluster
from tests.clone import Clone
from tests.running import ROOT
from tests.words import words

SHARED = ROOT.parent / "shared" / "data"
os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    return words(tmp_path_factory.mktemp("data") / "words")


@pytest.fixture
def make_data(tmp_path):
    """make_data(ids, vocabulary, name): a data set whose splits both hold ids."""

    def make(ids, vocab_size: int = 257, name: str = "made") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        ids = np.asarray(ids, "<u2")
        for split in ("train", "val"):
            ids.tofile(folder / f"{split}.bin")
        characters = "".join(map(chr, range(32, 32 + vocab_size)))
        tokenizer = {"name": "byte"} if vocab_size == 257 else {"name": "char", "characters": characters}
        about = {"tokenizer": tokenizer, "dtype": "uint16", "vocab_size": vocab_size}
        about |= {"train_tokens": len(ids), "val_tokens": len(ids), "source": "made", "sha256": ""}
        (folder / "meta.json").write_text(json.dumps(about))
        return folder

    return make


@pytest.fixture(scope="session")
def shakespeare() -> Path:
    path = SHARED / "tinyshakespeare" / "input.txt"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return path


@pytest.fixture(scope="session")
def bpe_files() -> None:
    folder = Path(os.environ["TIKTOKEN_CACHE_DIR"])
    if not folder.is_dir() or not list(folder.iterdir()):
        pytest.skip(f"TIKTOKEN_CACHE_DIR = {folder} holds no BPE files")


@pytest.fixture
def clone(tmp_path) -> Clone:
    return Clone(tmp_path)


@pytest.fixture
def trio(tmp_path):
    """Three hosts, to be broken."""
    cluster.require()
    (tmp_path / "cluster").mkdir()
    with cluster.Cluster(tmp_path / "cluster", 3) as made:
        yield made


LONG = [
    "zero",
    "hosts",
    "stopping",
    "readme",
    "zero_runs",
    "benchmark",
    "deepspeed_errors",
    "doctor",
    "crossing",
    "kill",
    "launch",
    "runs",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest first, so that no worker is left with one at the end."""
    order = {f"test_{name}.py": number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))
