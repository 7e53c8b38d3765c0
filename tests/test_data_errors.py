"""What can be wrong with a data set, or with the text for one: one message with the value, the rule and the fix."""

import json
import subprocess
import sys

import numpy as np
import pytest

from data.dataset import open_dataset
from data.errors import DataError
from tests.running import ROOT, prepare


def told(folder) -> str:
    with pytest.raises(DataError) as error:
        open_dataset(folder)
    return str(error.value)


def test_a_data_set_that_is_not_prepared(tmp_path):
    missing = "prepared: not tested here" if (ROOT / "data" / "openwebtext" / "train.bin").exists() else ""
    if not missing:
        expected = "data set 'openwebtext' is not prepared; run: python data/openwebtext/prepare.py"
        assert told(ROOT / "data" / "openwebtext") == expected
    assert "there is no data set data/shakespear; did you mean shakespeare?" in told(ROOT / "data" / "shakespear")
    assert told(tmp_path).startswith(f"{tmp_path} holds no data set: train.bin and val.bin must both be there")


def test_truncated_odd_and_empty_bins(make_data):
    folder = make_data(range(100))
    for size, rule in [(120, "has 60 tokens, meta.json says 100"), (121, "has an odd size: 121 bytes of uint16 ids")]:
        (folder / "val.bin").write_bytes(bytes(size))
        assert told(folder) == f"{folder / 'val.bin'} {rule}; prepare it again"


@pytest.mark.parametrize(
    "change, rule",
    [
        ({"dtype": "int8"}, "dtype = 'int8': must be one of uint16, uint32"),
        ({"vocab_size": 9}, "vocab_size = 9: the tokenizer has 257"),
        ({"train_tokens": None}, "is missing or of a wrong type"),
        ({"tokenizer": {"name": "bite"}}, "tokenizer 'bite': unknown; did you mean byte?"),
        ({"unfinished": True}, "was being prepared when that was interrupted; prepare it again"),
    ],
)
def test_a_meta_json_that_is_wrong(make_data, change, rule):
    folder = make_data(range(100))
    about = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**about, **change}))
    assert rule in told(folder)
    (folder / "meta.json").write_text("{")
    assert told(folder).startswith(f"{folder / 'meta.json'}:1: is not JSON")
    (folder / "meta.json").write_text("{}")
    assert "'tokenizer' is missing" in told(folder)


@pytest.mark.parametrize(
    "name, text, told",
    [
        ("a.txt", b"caf\xe9\n", "a.txt: byte 3 is not UTF-8; convert it first (iconv -t utf-8)"),
        ("a.txt", b"caf\xc3", "is not UTF-8; convert it first (iconv -t utf-8)"),
        ("a.jsonl", b'{"text": "x"}\n{"txt": "x"}\n', "a.jsonl:2: has no text under 'text', only txt; set --field"),
        ("a.jsonl", b'{"text": "x"}\n{', "a.jsonl:2: is not JSON"),
        ("a.parquet", b"PAR1 no", "a.parquet: cannot be read as parquet"),
        ("a.pdf", b"%PDF", "holds no .txt, .md, .jsonl, .parquet; rename or convert it"),
        ("a.txt", b"", "too little text, nothing is left for"),
    ],
)
def test_text_that_cannot_be_read(tmp_path, name, text, told):
    (tmp_path / name).write_bytes(text)
    arguments = ["--tokenizer", "byte", "--name", "x", "--out", tmp_path / "out"]
    assert told in prepare("text", "--input", tmp_path / name, *arguments)
    assert not (tmp_path / "out" / "train.bin").exists()


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--name", "x", "--tokenizer", "gpt3"], "tokenizer 'gpt3': unknown; did you mean gpt2?"),
        (["--name", "../x"], "--name '../x': must be letters, digits"),
        (["--name", "shakespeare"], "--name 'shakespeare': is a data set with a prepare.py of its own"),
        (["--name", "x", "--val-fraction", "1"], "must be between 0 and 1"),
    ],
)
def test_options_that_cannot_be(tmp_path, arguments, told):
    (tmp_path / "a.txt").write_text("text")
    assert told in prepare("text", "--input", tmp_path / "a.txt", *arguments)
    assert "no such file or folder" in prepare("text", "--input", tmp_path / "b", "--name", "x")


def test_no_network_says_what_to_do(tmp_path):
    """Through a proxy that is not there."""
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "ALL_PROXY"), "http://127.0.0.1:9")
    for name, fix in [("shakespeare_char", "give --input FILE"), ("fineweb_edu", "give --input FOLDER")]:
        done = subprocess.run(
            [sys.executable, f"data/{name}/prepare.py", "--out", tmp_path / name],
            cwd=ROOT,
            env={**proxies, "PATH": "", "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},  # else it tries for 20 s
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 2 and done.stderr.startswith("error: cannot "), done.stderr
        assert fix in done.stderr and "Traceback" not in done.stderr


def test_a_full_disk_leaves_the_data_set_that_was_there(tmp_path, make_data):
    folder = make_data(np.arange(200))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    code = (
        "import resource, runpy, sys, signal; sys.argv = sys.argv[1:]\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, 10**5)); runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "data/python_stdlib/prepare.py", "--out", folder],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (2, "error: output: File too large\n")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
