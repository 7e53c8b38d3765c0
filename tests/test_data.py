"""The prepare scripts, run as users run them, and data sets as training opens them."""

import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from data.dataset import open_dataset
from data.errors import DataError
from data.tokenizer import TIKTOKEN, BPETokenizer, ByteTokenizer, CharTokenizer, tokenizer_from
from data.writer import Writer, dtype_of
from tests.running import ROOT, prepare, started_with

TEXT = "To be, or not to be:\nthat is the question — Ωmega 🙂.\n"


def ids_of(folder: Path, split: str) -> np.ndarray:
    return np.fromfile(folder / f"{split}.bin", json.loads((folder / "meta.json").read_text())["dtype"])


def test_shakespeare_by_character_has_nanogpts_counts(tmp_path, shakespeare):
    output = prepare("shakespeare_char", "--input", shakespeare, "--out", tmp_path)
    assert "train 1,003,854 tokens, val 111,540 tokens, vocabulary 65" in output
    dataset = open_dataset(tmp_path)
    assert (dataset.train_tokens, dataset.val_tokens, dataset.vocab_size) == (1003854, 111540, 65)
    ids = np.concatenate([ids_of(tmp_path, "train"), ids_of(tmp_path, "val")])
    assert dataset.tokenizer.decode(ids.tolist()) == shakespeare.read_text()


def test_shakespeare_by_bpe_has_nanogpts_counts(tmp_path, shakespeare, bpe_files):
    output = prepare("shakespeare", "--input", shakespeare, "--out", tmp_path)
    assert "train 301,966 tokens, val 36,059 tokens, vocabulary 50,257" in output
    dataset = open_dataset(tmp_path)
    assert dataset.tokenizer.decode(ids_of(tmp_path, "val").tolist()).startswith("?\n\nGREMIO:")


def test_the_standard_library_is_the_same_each_time_and_split_by_file(tmp_path):
    for name in ("one", "two"):
        prepare("python_stdlib", "--out", tmp_path / name)
    for file in ("train.bin", "val.bin", "meta.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    train, val = (ids_of(tmp_path / "one", split) for split in ("train", "val"))
    assert len(train) > 5_000_000 and 0.02 < len(val) / len(train) < 0.1
    assert train[-1] == val[-1] == 256 and (val == 256).sum() > 20


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), CharTokenizer(TEXT), BPETokenizer("gpt2")])
def test_tokenizers_go_there_and_back(tokenizer, bpe_files):
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids.tolist()) == TEXT and ids.max() < tokenizer.vocab_size
    again = tokenizer_from(json.loads(json.dumps(tokenizer.describe())))
    assert (again.encode(TEXT) == ids).all() and len(again.encode("")) == 0
    if tokenizer.end_of_text is not None:
        ids = tokenizer.encode("a<|endoftext|>b", allow_special=True).tolist()
        assert len(ids) == 3 and ids[1] == tokenizer.end_of_text
        assert tokenizer.decode(ids) == "a<|endoftext|>b"
        assert tokenizer.end_of_text not in tokenizer.encode("a<|endoftext|>b").tolist()


def test_the_table_of_bpe_vocabularies_is_tiktokens(bpe_files):
    import tiktoken

    encoding = tiktoken.get_encoding("gpt2")
    assert TIKTOKEN["gpt2"] == (encoding.n_vocab, encoding.eot_token)


def test_ids_are_as_wide_as_the_vocabulary_needs():
    assert [dtype_of(size).name for size in (257, 50257, 65536, 65537, 200019)] == ["uint16"] * 3 + ["uint32"] * 2


def test_wide_ids_survive_and_ids_out_of_range_do_not(tmp_path):
    ids = np.array([0, 65536, 200018], np.uint32)
    with Writer(tmp_path, BPETokenizer("o200k_base"), "made") as writer:
        for split in ("train", "val"):
            writer.write(split, ids)
    assert open_dataset(tmp_path).dtype == "<u4"
    assert ids_of(tmp_path, "train").tolist() == [*ids, 199999]
    with (
        pytest.raises(DataError, match="ids from 0 to 300: 'byte' has those from 0 to 256"),
        Writer(tmp_path, ByteTokenizer(), "made") as writer,
    ):
        writer.write("train", np.array([0, 300]))
    assert ids_of(tmp_path, "train").tolist() == [*ids, 199999], "the data set that was there is gone"
    assert {path.name for path in tmp_path.iterdir()} == {"train.bin", "val.bin", "meta.json"}


@pytest.fixture
def parquet(tmp_path) -> Path:
    """Five files of 400 documents."""
    folder = tmp_path / "parquet"
    folder.mkdir()
    for number in range(5):
        rows = [f"Document {row} of file {number}. " * (row % 9 + 1) for row in range(400)]
        pyarrow.parquet.write_table(pyarrow.table({"text": rows, "id": rows}), folder / f"{number}.parquet")
    return folder


def test_web_text_does_not_depend_on_the_workers_and_is_whole(tmp_path, parquet, bpe_files):
    for workers in (1, 3):
        out = tmp_path / str(workers)
        prepare("fineweb_edu", "--input", parquet, "--out", out, "--workers", workers)
        assert {path.name for path in out.iterdir()} == {"train.bin", "val.bin", "meta.json"}
    for file in ("train.bin", "val.bin", "meta.json"):
        assert (tmp_path / "1" / file).read_bytes() == (tmp_path / "3" / file).read_bytes()
    ids = np.concatenate([ids_of(tmp_path / "1", split) for split in ("train", "val")])
    assert (ids == 50256).sum() == 2000
    assert 1 <= (ids_of(tmp_path / "1", "val") == 50256).sum() < 10


def test_a_killed_preparation_goes_on_where_it_was(tmp_path, parquet, bpe_files):
    prepare("openwebtext", "--input", parquet, "--out", tmp_path / "whole", "--workers", 1)
    out = tmp_path / "killed"
    arguments = ["--input", str(parquet), "--out", str(out), "--workers", "1"]
    command, env = [sys.executable, "data/openwebtext/prepare.py", *arguments], {**os.environ, "MARK": str(out)}
    process = subprocess.Popen(command, cwd=ROOT, env=env)
    while len(list(out.glob("shards/*.json"))) < 2:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert not (out / "train.bin").exists()
    end = time.monotonic() + 5
    while started_with(f"MARK={out}"):
        assert time.monotonic() < end, "a worker outlives its parent"
        time.sleep(0.05)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "of 5 files were tokenized before" in done.stderr
    for file in ("train.bin", "val.bin"):
        assert (out / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_ones_own_text_of_all_kinds(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text(TEXT)
    (tmp_path / "in" / "b.jsonl").write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(200)))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["in", "parquet"]}), tmp_path / "in" / "c.parquet")
    prepare("text", "--input", tmp_path / "in", "--tokenizer", "byte", "--name", "mine", "--out", tmp_path / "out")
    tokenizer = open_dataset(tmp_path / "out").tokenizer
    train, val = (
        tokenizer.decode(ids_of(tmp_path / "out", s).tolist()).split("<|endoftext|>")[:-1] for s in ("train", "val")
    )
    assert sorted(train + val) == sorted([TEXT, *(f"row {i}" for i in range(200)), "in", "parquet"])
    assert 10 < len(val) < 35


@pytest.mark.parametrize("tokenizer", ["byte", "gpt2"])
def test_a_long_text_is_cut_without_a_trace(tmp_path, tokenizer, bpe_files):
    """It is read in parts of 4 MiB."""
    text = "".join(f"Line {i}, of no great length.\n" + "  \n\n\tIndented.\n" * (i % 7 == 0) for i in range(300_000))
    (tmp_path / "long.txt").write_text(text)
    assert len(text) > 2 * 2**22
    out = tmp_path / "out"
    prepare("text", "--input", tmp_path / "long.txt", "--tokenizer", tokenizer, "--name", "x", "--out", out)
    one = tokenizer_from({"name": tokenizer})
    train, val = (ids_of(out, split)[:-1] for split in ("train", "val"))
    assert one.decode(train.tolist()) + one.decode(val.tolist()) == text
    assert train.tolist() == one.encode(text[: len(one.decode(train.tolist()))]).tolist()
    assert 0.08 < len(val) / (len(train) + len(val)) < 0.12


def test_nanogpts_folders_are_read_as_they_are(tmp_path):
    for split in ("train", "val"):
        np.array([0, 2, 1], "<u2").tofile(tmp_path / f"{split}.bin")
    bare = open_dataset(tmp_path)
    assert (bare.vocab_size, bare.train_tokens, bare.tokenizer.name) == (50257, 3, "gpt2")
    itos = dict(enumerate("abc"))
    meta = {"vocab_size": 3, "itos": itos, "stoi": {c: i for i, c in itos.items()}}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    chars = open_dataset(tmp_path)
    assert (chars.vocab_size, chars.tokenizer.decode([0, 2, 1])) == (3, "acb")


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


def test_no_code_in_a_pickle_is_run(tmp_path, capsys):
    for split in ("train", "val"):
        np.array([0, 2, 1], "<u2").tofile(tmp_path / f"{split}.bin")
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"itos": Evil()}))
    with pytest.raises(DataError, match=r"meta\.pkl is not nanoGPT's: it wants to call builtins\.print"):
        open_dataset(tmp_path)
    assert capsys.readouterr().out == ""
