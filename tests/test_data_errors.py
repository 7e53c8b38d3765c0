"""Bad data sets and bad text: one message with the value, the rule and the fix."""

import json
import math
import os
import subprocess
import sys
import time

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from data import tokenizer
from data.dataset import open_dataset
from data.errors import DataError, check_types, did_you_mean
from data.prepare import READERS, find_files
from sample import read_prompt
from tests.running import ROOT, prepare
from training.errors import ConfigError


def error_of(folder) -> str:
    """The message of open_dataset."""
    with pytest.raises(DataError) as error:
        open_dataset(folder)
    return str(error.value)


def test_a_data_set_that_is_not_prepared(tmp_path):
    known, unknown = ROOT / "data" / "openwebtext", ROOT / "data" / "shakespear"
    if not (known / "train.bin").exists():
        assert error_of(known) == f"data set 'openwebtext' is not prepared; run: python {known / 'prepare.py'}"
    assert error_of(unknown) == f"there is no data set {unknown}; did you mean shakespeare?"
    assert "; to make one from your own text: python data/text/prepare.py" in error_of(ROOT / "data" / "xyzxyz")
    assert error_of(tmp_path).startswith(f"{tmp_path} is not a data set: it must contain train.bin and val.bin")


def test_truncated_odd_and_empty_bins(make_data):
    folder = make_data(range(100))
    for size, rule in [
        (120, "has 60 tokens, meta.json says 100"),
        (121, "121 bytes are not a whole number of uint16 ids"),
    ]:
        (folder / "val.bin").write_bytes(bytes(size))
        assert error_of(folder) == f"{folder / 'val.bin'}: {rule}; prepare it again"


@pytest.mark.parametrize(
    "change, rule",
    [
        ({"dtype": "int8"}, "dtype = 'int8': must be uint16 or uint32; prepare it again"),
        ({"train_tokens": None}, "train_tokens = None: must be an integer"),
        ({"tokenizer": {"name": "bite"}}, "unknown tokenizer 'bite'; did you mean byte?"),
    ],
)
def test_a_meta_json_that_is_wrong(make_data, change, rule):
    folder = make_data(range(100))
    about = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**about, **change}))
    assert rule in error_of(folder)
    (folder / "meta.json").write_text("{")
    assert error_of(folder).startswith(f"{folder / 'meta.json'} is not JSON")
    (folder / "meta.json").write_text("{}")
    assert "'tokenizer' is missing" in error_of(folder)


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.txt", b"caf\xe9\n", "a.txt:1: is not UTF-8; convert the file (iconv -t utf-8)"),
        ("a.txt", b"caf\xc3", "is not UTF-8; convert the file (iconv -t utf-8)"),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"txt": "x"}\n',
            "a.jsonl:2: must be JSON with text under 'text'; fix the line or set --field",
        ),
        ("a.jsonl", b'{"text": "x"}\n{', "a.jsonl:2: must be JSON"),
        ("a.parquet", b"PAR1 no", "a.parquet: not readable as parquet"),
        ("a.pdf", b"%PDF", "a.pdf: no .txt, .md, .jsonl, .parquet file there; rename or convert the text"),
        ("a.txt", b"", "too little text, train.bin would be empty; add more text"),
    ],
)
def test_text_that_cannot_be_read(tmp_path, name, text, message):
    (tmp_path / name).write_bytes(text)
    arguments = ["--tokenizer", "byte", "--name", "x", "--out", tmp_path / "out"]
    assert message in prepare("text", "--input", tmp_path / name, *arguments)
    assert not (tmp_path / "out" / "train.bin").exists()


@pytest.mark.parametrize(
    "line",
    [
        *(b'{"text": "\\ud800"}', b'{"text": "\xed\xa0\x80"}'),  # half of a surrogate pair
        *(b'{"text": ' + b"[" * 10**5, b'{"text": 1}', b"[]", b'"text"'),
    ],
)
def test_a_row_without_text_is_named(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "\\ud83d\\ude00"}\n' + line)  # a whole pair is a character
    rows = READERS[".jsonl"](path, "text")
    assert next(rows) == "\U0001f600"
    with pytest.raises(DataError, match=r"a\.jsonl:2: must be JSON with text under 'text'"):
        next(rows)


def test_a_column_of_another_type_is_named(tmp_path):
    buffers = [None, pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0"), pyarrow.py_buffer(b"\xe9")]
    latin1 = pyarrow.Array.from_buffers(pyarrow.string(), 1, buffers)
    coded = pyarrow.array(["a"]).dictionary_encode()  # how pandas stores a column with few different texts
    table = pyarrow.table({"text": ["a"], "number": [1], "raw": [b"a"], "coded": coded, "latin1": latin1})
    pyarrow.parquet.write_table(table, path := tmp_path / "a.parquet")
    assert list(READERS[".parquet"](path, "text")) == list(READERS[".parquet"](path, "coded")) == ["a"]
    with pytest.raises(DataError, match=r"not readable as parquet \('utf-8' codec can't decode byte 0xe9"):
        list(READERS[".parquet"](path, "latin1"))
    for field, kind in (("number", "int64"), ("raw", "binary")):
        with pytest.raises(DataError, match=f"column '{field}' is of type {kind}, must be string"):
            list(READERS[".parquet"](path, field))


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(DataError, match=r"no \.txt, .* file there"):
        find_files([tmp_path / "a.txt"])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--name", "x", "--tokenizer", "gpt3"], "unknown tokenizer 'gpt3'; did you mean gpt2?"),
        (["--name", "../x"], "--name '../x': must be letters, digits"),
        (["--name", "shakespeare"], "--name 'shakespeare': must be letters, digits"),
        (["--name", "x", "--val-fraction", "1"], "--val-fraction 1.0: must be between 0 and 1"),
    ],
)
def test_bad_options(tmp_path, arguments, message):
    (tmp_path / "a.txt").write_text("text")
    assert message in prepare("text", "--input", tmp_path / "a.txt", *arguments)
    assert "b: no .txt, .md, .jsonl, .parquet file there" in prepare("text", "--input", tmp_path / "b", "--name", "x")


@pytest.mark.parametrize(
    "name, known, hint",
    [("zero_2", ["zero2", "ddp"], "; did you mean zero2?"), ("x", ["zero2"], ""), ("", [], "")],
)
def test_hint_for_a_misspelled_name(name, known, hint):
    assert did_you_mean(name, known) == hint


@pytest.mark.parametrize(
    "value, types, problem",
    [
        (3, int, None),
        (3, float, None),
        (None, (str, type(None)), None),
        (10**4000, float, None),
        (True, int, "key = True: must be an integer"),
        (3.0, int, "key = 3.0: must be an integer"),
        ("3", int, "key = '3': must be an integer"),
        (math.nan, float, "key = nan: must be a number"),
        (-math.inf, (float, type(None)), "key = -inf: must be a number or null"),
        ([1] * 99, dict, "key = [1, 1, 1, 1, 1, 1, ...]: must be an object"),
    ],
)
def test_types_of_parsed_json(value, types, problem):
    assert check_types({"key": value, "more": 1}, {"key": types}) == ([problem] if problem else [])
    assert check_types({"more": 1}, {"key": types, "more": str}) == ["'key' is missing", "more = 1: must be a string"]
    assert check_types([value], {"key": types})[0].startswith("must be an object, not [")


@pytest.mark.parametrize(
    "command, download, fix",
    [
        ("data/shakespeare_char/prepare.py", "https://raw.githubusercontent.com/", "pass --input FILE"),
        ("data/fineweb_edu/prepare.py", "HuggingFaceFW/fineweb-edu from Hugging Face", "pass --input FOLDER"),
        ("data/text/prepare.py --name=x --input README.md", "'gpt2' from OpenAI", "set TIKTOKEN_CACHE_DIR"),
        (
            "sample.py --init_from=gpt2",
            "'gpt2' is no folder, and cannot be downloaded (",
            "give their folder instead of gpt2",
        ),
    ],
)
def test_no_network_is_reported_at_once(tmp_path, command, download, fix):
    """Through a proxy that is not there. The hub's own retries take 23 s."""
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "ALL_PROXY"), "http://127.0.0.1:9")
    caches = dict.fromkeys(("HOME", "HF_HOME", "TIKTOKEN_CACHE_DIR"), str(tmp_path))
    out = ["--out", tmp_path / "out"] if command.startswith("data/") else []
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, *command.split(), *out],
        cwd=ROOT,
        env={**proxies, **caches, "PATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert download in done.stderr and fix in done.stderr
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("start", ["\udcff", "FILE:\0", "FILE:/", "FILE:\udcff"])
def test_a_prompt_that_is_no_text_is_named(start):
    with pytest.raises(ConfigError, match=r"start = .*: .*; give text, or FILE: and the path of a UTF-8 file"):
        read_prompt(start, tokenizer.ByteTokenizer())


def test_a_full_disk_leaves_the_data_set_that_was_there(tmp_path, make_data):
    folder = make_data(np.arange(200))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    code = (
        "import resource, runpy, sys, signal; sys.argv = sys.argv[1:]\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, 10**5)); runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "data/python_docs/prepare.py", "--out", folder],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (2, "error: [Errno 27] File too large\n")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
