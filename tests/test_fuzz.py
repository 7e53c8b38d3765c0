"""Whatever a file, a command line or a host holds, it is used, or refused with a message; no code in it runs.

python -m pytest tests/test_fuzz.py -n0                    # 30 s in all; the same cases every time
python -m pytest tests/test_fuzz.py -n0 --fuzz-minutes=10  # other cases every time
"""

import io
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import zipfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

import sample
from data.dataset import open_dataset
from launch import hosts
from launch.machine import describe
from model import GPT, GPTConfig
from tests.checkpoints import BYTES, nanogpt_file, run_folder
from tests.fuzzing import Case, damaged, edited, fuzz, json_files, scalars, texts_of, values
from tests.running import ROOT
from tests.words import words
from tools.convert import convert
from tools.convert_read import open_source
from training import deepspeed_config, distributed, figures
from training.batches import Batches
from training.checkpoint import METADATA, OWN_CHECKSUM, Checkpoints
from training.config import PlainTrainConfig, TrainConfig, parse
from training.deepspeed_config import DeepSpeedTrainConfig
from training.deepspeed_engine import own_swap_folders
from training.deepspeed_json import KEYS as JSON_KEYS
from training.deepspeed_json import UNSUPPORTED
from training.distributed import SINGLE_PROCESS
from training.init import InitState, find_init_state
from training.metrics import Metrics
from training.model_state import SavedState, reading
from training.run_folder import explain_out_of_memory

CI_SECONDS = 30.0  # of all targets together
SMALL = GPTConfig(block_size=8, vocab_size=257, n_layer=1, n_head=1, n_embd=8, bias=True)
SMALL_ARGUMENTS = ["--n_layer=1", "--n_head=1", "--n_embd=8", "--block_size=8", "--bias=True", "--compile=False"]
CONFIGS: list[Any] = [PlainTrainConfig, DeepSpeedTrainConfig, sample.SampleConfig]
KEYS = sorted({name for cls in CONFIGS for name in cls.__dataclass_fields__})
Target = tuple[st.SearchStrategy, Callable[[Any], object]]  # cases, and what reads one
CANARY = Path(os.environ.get("TMPDIR", "/tmp"), f"canary-{os.getpid()}")


class Canary:
    """In a pickle: code that leaves a file when it runs."""

    def __reduce__(self) -> Any:
        return CANARY.touch, ()


def parse_as_scripts_do(cls: Any, argv: list[str]) -> Any:
    """Settings that are accepted can be used."""
    try:
        cfg = parse(cls, argv, "")
    finally:
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # --help changes it
    if isinstance(cfg, TrainConfig):
        cfg.model_config(257)
        assert timedelta(minutes=cfg.hang_minutes or 10, seconds=30)
    distributed.pick_dtype(cfg.dtype, distributed.pick_device(cfg.device, 0, 1))
    return cfg


def config_files(folder: Path) -> Target:
    odd = st.sampled_from(["10**500", "1e999", "'a'", "None", "[]", "lambda: 0", "batch_size", "1/0"])
    names = st.sampled_from([*KEYS, "_a", "n_heads", "dtype.x", "a b"])
    line = st.builds("{} = {}".format, names, scalars.map(repr) | odd)
    recipes = [damaged(Case(path.name, path.read_bytes())) for path in sorted((ROOT / "config").glob("train_[ds]*.py"))]

    def read(value: tuple[Any, Case]) -> None:
        (folder / "config.py").write_bytes(value[1].content)
        parse_as_scripts_do(value[0], [str(folder / "config.py")])

    return st.tuples(st.sampled_from(CONFIGS), st.one_of(texts_of(line), *recipes)), read


def command_lines(_: Path) -> Target:
    text = st.binary(max_size=8).map(lambda content: os.fsdecode(content.replace(b"\0", b"")))  # as in sys.argv
    given = scalars.map(lambda value: str(value).replace("\0", "")) | text
    pair = st.builds("--{}={}".format, st.sampled_from(KEYS), given)
    word = st.sampled_from([*(f"--{name}" for name in KEYS), "--help", "--local_rank=0", "--deepspeed", "-"]) | text

    def read(value: tuple[Any, list[str]]) -> None:
        parse_as_scripts_do(*value)

    return st.tuples(st.sampled_from(CONFIGS), st.lists(pair | word, max_size=4)), read


def resumed_settings(folder: Path) -> Target:
    """The config.json of a run to resume."""
    seeds = {cls.__name__: cls().__dict__ for cls in CONFIGS[:2]}

    def read(value: tuple[Any, Case]) -> None:
        (folder / "config.json").write_bytes(value[1].content)
        parse_as_scripts_do(value[0], ["--init_from=resume", f"--out_dir={folder}"])

    return st.tuples(st.sampled_from(CONFIGS[:2]), json_files(seeds, ("strategy", "deepspeed_config"))), read


def hostfiles(folder: Path) -> Target:
    name = st.sampled_from(["host1", "host2", "user@host3"]) | st.text(max_size=5)
    slots = st.sampled_from(["1", "2", "0", "-1", "8", "\u0663", "\u00b2", "9" * 11, "9" * 5000]) | st.text(max_size=3)

    def read(case: Case) -> None:
        (folder / "hostfile").write_bytes(case.content)
        hosts.read_hostfile(str(folder / "hostfile"))

    return texts_of(st.builds("{} slots={}".format, name, slots)), read


def deepspeed_jsons(folder: Path) -> Target:
    seeds = {path.name: json.loads(path.read_text()) for path in sorted((ROOT / "deepspeed_configs").glob("*.json"))}
    blocks = [block for block in JSON_KEYS.values() if isinstance(block, dict)]
    keys = tuple(sorted({*JSON_KEYS, *UNSUPPORTED, *(key for block in blocks for key in block)}))

    def read(case: Case) -> None:
        path = folder / "ds.json"
        path.write_bytes(case.content)
        arguments = [f"--deepspeed_config={path}", "--device=cpu", f"--nvme_path={folder}", f"--out_dir={folder}"]
        cfg = parse_as_scripts_do(DeepSpeedTrainConfig, [*arguments, *SMALL_ARGUMENTS])
        config, _ = deepspeed_config.resolve(cfg, SINGLE_PROCESS, SMALL, deepspeed_config.read(cfg.deepspeed_config))
        with own_swap_folders(config, SINGLE_PROCESS):
            pass

    return json_files(seeds, keys), read


def checkpoint_jsons(folder: Path) -> Target:
    """Their own checksums are never removed: without one, only a file of an early version is accepted."""
    run_folder(folder / "run", SMALL)
    newest, about = Checkpoints(str(folder / "run")).newest()
    shutil.copytree(newest, newest.with_name("step_000001"))
    dataset = open_dataset(words(folder / "words"))

    def train(*settings: str) -> None:
        cfg = parse(PlainTrainConfig, [f"--out_dir={folder / 'run'}", "--eval_only", *settings, *SMALL_ARGUMENTS], "")
        init = find_init_state(cfg, Checkpoints(cfg.out_dir), dataset)
        assert init.checkpoint, "starts again from scratch"
        assert type(init.step) is int and init.step >= 0, f"step {init.step!r}"
        assert isinstance(init.best_val_loss, int | float | None), f"best_val_loss {init.best_val_loss!r}"
        with explain_out_of_memory(cfg, SINGLE_PROCESS, init.model, "single", torch.float32):
            model = GPT(init.model)
            with reading(init.checkpoint, SINGLE_PROCESS) as saved:
                saved.into(model)

    readers: dict[str, Callable[[], object]] = {
        "--init_from=resume": lambda: train("--init_from=resume"),
        "--resume=auto": lambda: train("--resume=auto"),
        "sample.py": lambda: sample.load(sample.SampleConfig(str(folder / "run")), torch.device("cpu")),
        "tools.convert": lambda: read_all(open_source(str(folder / "run"))[0]),
    }

    def with_own_checksum(tree: Any) -> str:
        return json.dumps({**tree, OWN_CHECKSUM: about[OWN_CHECKSUM]} if isinstance(tree, dict) else tree)

    def read(value: tuple[str, Case]) -> None:
        (newest / METADATA).write_bytes(value[1].content)
        readers[value[0]]()

    return st.tuples(st.sampled_from(sorted(readers)), json_files({METADATA: about}, fix=with_own_checksum)), read


def read_all(saved: SavedState) -> None:
    for name, kind in saved.pieces:
        saved.whole(name, kind)


def data_sets(folder: Path) -> Target:
    """meta.json, and nanoGPT's meta.pkl."""
    for split in ("train", "val"):
        np.arange(50, dtype="<u2").tofile(folder / f"{split}.bin")
    about = {"dtype": "uint16", "vocab_size": 257, "train_tokens": 50, "val_tokens": 50, "source": "", "sha256": ""}
    char = {**about, "tokenizer": {"name": "char", "characters": "abc"}, "vocab_size": 3}
    seeds = {"byte": {**about, "tokenizer": {"name": "byte"}}, "char": char, "gpt2": {**about, "tokenizer": "gpt2"}}
    meta = {"vocab_size": 2, "itos": {0: "a", 1: "b"}, "stoi": {"a": 0, "b": 1}}
    pickles = [damaged(Case(f"protocol {n}", pickle.dumps(meta, protocol=n))) for n in range(6)]
    pickles += [damaged(Case(f"canary {n}", pickle.dumps({**meta, "itos": Canary()}, protocol=n))) for n in range(6)]
    files = [st.tuples(st.just("meta.json"), json_files(seeds)), st.tuples(st.just("meta.pkl"), st.one_of(pickles))]

    def read(value: tuple[str, Case]) -> None:
        for name in ("meta.json", "meta.pkl"):
            (folder / name).unlink(missing_ok=True)
        (folder / value[0]).write_bytes(value[1].content)
        tokenizer = open_dataset(folder).tokenizer
        json.dumps(tokenizer.description)  # goes into checkpoint.json

    return st.one_of(files), read


def metrics_files(folder: Path) -> Target:
    """metrics.jsonl, read as a run is resumed, as its loss is drawn, and by the tools; some with a config.json."""
    numbers = {"step_ms": 1.5, "tokens_per_second": 1e3, "mfu": None, "peak_memory_bytes": 1}
    rows: list[dict[str, Any]] = [
        {"kind": "train", "step": 0, "loss": 5.5, "lr": 0.1, "grad_norm": 1.0, **numbers},
        {"kind": "eval", "step": 1, "train_loss": 5.0, "val_loss": 5.1},
        {"kind": "save", "step": 1, "save_ms": 3.0},
        {"kind": "ranks", "step": 0, "matmul_ms": [1.0]},
    ]
    out_dir = f"--out_dir={folder}"
    cfg: Any = parse(PlainTrainConfig, [out_dir, *SMALL_ARGUMENTS, f"--dataset={words(folder / 'words')}"], "")
    init, batches = InitState(SMALL, step=2), Batches(cfg, SINGLE_PROCESS)
    readers: dict[str, Callable[[], object]] = {
        "rewind": lambda: Metrics(cfg, SINGLE_PROCESS, batches, init, torch.float32),
        "training.figures": lambda: figures.read_run(folder),
    }

    def read(value: tuple[str, Case, Case]) -> None:
        (folder / "metrics.jsonl").write_bytes(value[1].content)
        (folder / "config.json").write_bytes(value[2].content)
        readers[value[0]]()

    def row(number: int) -> st.SearchStrategy[bytes]:
        seed = Case("", json.dumps(rows[number]).encode())
        return edited(seed, ("kind", "step")).map(lambda case: case.content)

    lines = st.lists(st.integers(0, 3).flatmap(row) | values.map(lambda value: json.dumps(value).encode()), max_size=4)
    whole = Case("metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    files = damaged(whole) | lines.map(b"\n".join).map(lambda text: Case(repr(text), text + b"\n"))
    config = st.just(Case("", json.dumps(cfg.__dict__).encode())) | json_files({"config.json": cfg.__dict__})
    return st.tuples(st.sampled_from(sorted(readers)), files, config), read


def rewritten(path: Path, name: str, content: bytes, compression: int = zipfile.ZIP_STORED) -> bytes:
    """A zip file with another content of a file in it, and with right checksums."""
    written = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(written, "w", compression) as new:
        for entry in old.namelist():
            new.writestr(entry, content if entry.endswith(name) else old.read(entry))
    return written.getvalue()


def weights_files(folder: Path) -> Target:
    """ckpt.pt of torch's formats, with pickles that are damaged inside of intact zip files; and safetensors."""
    nanogpt_file(ckpt := folder / "ckpt.pt", SMALL)
    nanogpt_file(canary := folder / "canary.pt", SMALL, iter_num=Canary())
    torch.save(torch.load(ckpt), old := folder / "old.pt", _use_new_zipfile_serialization=False)
    convert(str(ckpt), folder / "w.safetensors", "safetensors", tokenizer=BYTES)
    deflated = rewritten(ckpt, "version", b"3\n", zipfile.ZIP_DEFLATED)
    files = [Case(path.name, path.read_bytes()) for path in (ckpt, canary, old, folder / "w.safetensors")]
    cases = [st.tuples(st.none(), damaged(file)) for file in (*files, Case("deflated", deflated))]
    for path in (ckpt, canary):
        with zipfile.ZipFile(path) as archive:
            inner = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
        cases.append(st.tuples(st.just(path), damaged(Case("its data.pkl", inner))))

    def read(value: tuple[Path | None, Case]) -> None:
        path, case = value
        content = rewritten(path, "data.pkl", case.content) if path else case.content
        (folder / "source").write_bytes(content)
        read_all(open_source(str(folder / "source"), BYTES)[0])

    return st.one_of(cases), read


def answers(folder: Path) -> Target:
    """What two hosts print, one of them what is expected."""
    expected = {**describe(), "address": "10.0.0.1"}
    pair = {"first": 1, "second": 2}
    program = 'cat "$1"; cat "$1" >&2; exit $2'

    def read(value: tuple[Case, int, int]) -> None:
        (case, status, number), names = value, list(pair)
        (folder / "answer").write_bytes(case.content)
        command = ["sh", "-c", program, "sh", str(folder / "answer"), str(status)]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, errors="replace")
        try:
            answer = hosts.read_answer(names[number], process, "", hosts.ANSWER)
        finally:
            process.kill()
            process.wait()
        given = {names[number]: answer, names[1 - number]: {**expected, "arrived": 0.0}}
        hosts.check(pair, given)
        with mock.patch("socket.gethostbyname", side_effect=OSError):  # names that only ssh knows
            hosts.master_address(pair, given)

    return st.tuples(json_files({"answer": expected}), st.sampled_from([0, 1, 2, 127, 255]), st.integers(0, 1)), read


TARGETS: dict[str, Callable[[Path], Target]] = {
    "config files": config_files,
    "command lines": command_lines,
    "config.json": resumed_settings,
    "hostfiles": hostfiles,
    "DeepSpeed JSONs": deepspeed_jsons,
    "checkpoint.json": checkpoint_jsons,
    "data sets": data_sets,
    "metrics.jsonl": metrics_files,
    "weights": weights_files,
    "answers of hosts": answers,
}


@pytest.mark.parametrize("name", TARGETS)
def test_fuzz(tmp_path, monkeypatch, request, record_property, name):
    minutes = request.config.getoption("fuzz_minutes")
    seed = random.SystemRandom().randrange(2**32) if minutes else 0
    monkeypatch.chdir(tmp_path)  # where no word of a command line is a config file
    (tmp_path / "deepspeed_configs").symlink_to(ROOT / "deepspeed_configs")
    strategy, read = TARGETS[name](tmp_path)

    def read_without_code(case: Any) -> None:
        CANARY.unlink(missing_ok=True)
        try:
            read(case)
        finally:
            assert not CANARY.exists(), "code in the file ran"

    tally = fuzz(strategy, read_without_code, (60 * minutes or CI_SECONDS) / len(TARGETS), seed)
    record_property("fuzz", [name, *(tally.counts[key] for key in ("cases", "used", "refused")), len(tally.failures)])
    if tally.failures:
        pytest.fail(tally.report(), pytrace=False)
    assert tally.counts["used"] and tally.counts["refused"], "these cases would find nothing"
