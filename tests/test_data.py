"""The prepare scripts, run as users run them, and opening the data sets that they write."""

import json
import pickle
import re
import shutil
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from data.dataset import open_dataset
from data.errors import DataError
from data.openwebtext import prepare as openwebtext
from data.prepare import Writer, run
from data.tokenizer import TIKTOKEN, BPETokenizer, ByteTokenizer, CharTokenizer, tokenizer_from
from tests.running import ROOT, prepare

TEXT = "To be, or not to be:\nthat is the question — Ωmega 🙂.\n"


def ids_of(folder: Path, split: str) -> np.ndarray:
    return np.fromfile(folder / f"{split}.bin", json.loads((folder / "meta.json").read_text())["dtype"])


def test_shakespeare_by_character_has_nanogpts_counts(tmp_path, shakespeare):
    output = prepare("shakespeare_char", "--input", shakespeare, "--out", tmp_path)
    assert "train 1,003,854 tokens, val 111,540 tokens, vocabulary 65" in output
    dataset = open_dataset(tmp_path)
    assert (dataset.tokens, dataset.vocab_size) == ({"train": 1003854, "val": 111540}, 65)
    ids = np.concatenate([ids_of(tmp_path, "train"), ids_of(tmp_path, "val")])
    assert dataset.tokenizer.decode(ids.tolist()) == shakespeare.read_text()


def test_shakespeare_by_bpe_has_nanogpts_counts(tmp_path, shakespeare, bpe_files):
    output = prepare("shakespeare", "--input", shakespeare, "--out", tmp_path)
    assert "train 301,966 tokens, val 36,059 tokens, vocabulary 50,257" in output
    dataset = open_dataset(tmp_path)
    assert dataset.tokenizer.decode(ids_of(tmp_path, "val").tolist()).startswith("?\n\nGREMIO:")


def test_an_input_beside_the_output_is_not_downloaded(tmp_path):
    (tmp_path / "input.txt").write_text(TEXT * 20)
    assert f"train {len(TEXT) * 18:,} tokens" in prepare("shakespeare_char", "--out", tmp_path)


def test_pythons_documentation_is_prose_and_the_same_each_time(tmp_path):
    for name in ("one", "two"):
        prepare("python_docs", "--out", tmp_path / name)
    for file in ("train.bin", "val.bin", "meta.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    decode = open_dataset(tmp_path / "one").tokenizer.decode
    train, val = (decode(ids_of(tmp_path / "one", split).tolist()) for split in ("train", "val"))
    assert len(train) > 500_000 and 0.02 < len(val) / len(train) < 0.1
    paragraphs = [text.removesuffix("\n\n").split("\n\n") for text in (train, val)]
    assert not set(paragraphs[0]) & set(paragraphs[1]) and len(set(paragraphs[0])) == len(paragraphs[0]) > 3000
    assert all(re.fullmatch("[A-Z].{59,}[.]", paragraph) for paragraph in chain(*paragraphs))
    assert (train + val).isascii() and not re.search("  |[^\n]\n[^\n]|[0-9<>={}@`*]", train + val)


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), CharTokenizer(TEXT), BPETokenizer("gpt2")])
def test_tokenizers_go_there_and_back(tokenizer, bpe_files):
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids.tolist()) == TEXT and ids.max() < tokenizer.vocab_size
    again = tokenizer_from(json.loads(json.dumps(tokenizer.description)))
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


@pytest.mark.parametrize("vocab_size, dtype", [(257, "uint16"), (65536, "uint16"), (65537, "uint32")])
def test_ids_are_as_wide_as_the_vocabulary_needs(tmp_path, vocab_size, dtype):
    tokenizer = CharTokenizer("".join(chr(2**16 + i) for i in range(vocab_size)))  # beyond the surrogates
    with Writer(tmp_path, tokenizer, "made") as writer:
        for split in ("train", "val"):
            writer.write(split, np.array([vocab_size - 1]))
    assert open_dataset(tmp_path).dtype.name == dtype
    assert ids_of(tmp_path, "val").tolist() == [vocab_size - 1]


def test_wide_ids_survive_and_ids_out_of_range_do_not(tmp_path):
    ids = np.array([0, 65536, 200018], np.uint32)
    with Writer(tmp_path, BPETokenizer("o200k_base"), "made") as writer:
        for split in ("train", "val"):
            writer.write(split, ids)
    assert open_dataset(tmp_path).dtype == "<u4"
    assert ids_of(tmp_path, "train").tolist() == [*ids, 199999]
    with (
        pytest.raises(AssertionError, match="ids to 300, vocabulary of 257"),
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


def test_web_text_is_complete_and_in_order(tmp_path, parquet, bpe_files):
    prepare("fineweb_edu", "--input", parquet, "--out", tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"train.bin", "val.bin", "meta.json"}
    ids = np.concatenate([ids_of(tmp_path / "out", split) for split in ("train", "val")])
    assert (ids == 50256).sum() == 2000
    assert 1 <= (ids_of(tmp_path / "out", "val") == 50256).sum() < 10
    text = open_dataset(tmp_path / "out").tokenizer.decode(ids_of(tmp_path / "out", "train").tolist())
    places = [(int(file), int(row)) for row, file in re.findall(r"<\|endoftext\|>Document (\d+) of file (\d)", text)]
    assert len(places) > 1980 and places == sorted(places)


def test_files_of_the_hub_are_downloaded_and_deleted_at_the_end(tmp_path, parquet, bpe_files, monkeypatch):
    """The hub's own parquet conversion is used if the authors published another format."""
    out = tmp_path / "out"

    def list_repo_files(repository: str, repo_type: str, revision: str) -> list[str]:
        return ["README.md"] if revision == "main" else [f"plain_text/{path.name}" for path in parquet.iterdir()]

    def snapshot_download(repository: str, allow_patterns: list[str], revision: str, local_dir: str, **_: str) -> None:
        assert (repository, revision) == ("Skylion007/openwebtext", "refs/convert/parquet")
        for name in allow_patterns:
            (Path(local_dir) / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(parquet / Path(name).name, Path(local_dir) / name)

    monkeypatch.setattr("huggingface_hub.get_session", MagicMock())
    monkeypatch.setattr("huggingface_hub.list_repo_files", list_repo_files)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr("sys.argv", ["prepare.py", "--out", str(out), "--files", "4"])
    run(lambda parser: openwebtext.main(parser, "Skylion007/openwebtext", "plain_text"), openwebtext.__file__, "")
    prepare("openwebtext", "--input", parquet, "--out", tmp_path / "local", "--files", 4)
    assert {path.name for path in out.iterdir()} == {"train.bin", "val.bin", "meta.json"}
    for file in ("train.bin", "val.bin", "meta.json"):
        assert (out / file).read_bytes() == (tmp_path / "local" / file).read_bytes()


def test_a_killed_preparation_is_not_taken_for_a_data_set(tmp_path, parquet, bpe_files):
    prepare("openwebtext", "--input", parquet, "--out", tmp_path / "whole")
    out = tmp_path / "killed"
    arguments = ["--input", str(parquet), "--out", str(out)]
    command = [sys.executable, "data/openwebtext/prepare.py", *arguments]
    process = subprocess.Popen(command, cwd=ROOT)
    while not any(path.stat().st_size for path in out.glob(".train.bin.unfinished")):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert not (out / "train.bin").exists()
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    assert {path.name for path in out.iterdir()} == {"train.bin", "val.bin", "meta.json"}
    for file in ("train.bin", "val.bin"):
        assert (out / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_ones_own_text_of_all_kinds(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text(TEXT)
    (tmp_path / "in" / "b.jsonl").write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(3000)))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["in", "parquet"]}), tmp_path / "in" / "c.parquet")
    prepare("text", "--input", tmp_path / "in", "--tokenizer", "byte", "--name", "mine", "--out", tmp_path / "out")
    tokenizer = open_dataset(tmp_path / "out").tokenizer
    train, val = (
        tokenizer.decode(ids_of(tmp_path / "out", s).tolist()).split("<|endoftext|>")[:-1] for s in ("train", "val")
    )
    assert sorted(train + val) == sorted([TEXT, *(f"row {i}" for i in range(3000)), "in", "parquet"])
    assert 200 < len(val) < 400


@pytest.mark.parametrize("tokenizer", ["byte", "gpt2"])
def test_a_long_text_is_cut_without_a_trace(tmp_path, tokenizer, bpe_files):
    """Its last tenth, from the beginning of a line, is for validation."""
    text = "".join(f"Line {i}, of no great length.\n" + "  \n\n\tIndented.\n" * (i % 7 == 0) for i in range(50_000))
    (tmp_path / "long.txt").write_text(text)
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
    assert (bare.vocab_size, bare.tokens["train"], bare.tokenizer.name) == (50257, 3, "gpt2")
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
    with pytest.raises(DataError, match=r"meta\.pkl is not a meta\.pkl of nanoGPT .*refused to call builtins\.print"):
        open_dataset(tmp_path)
    assert capsys.readouterr().out == ""
