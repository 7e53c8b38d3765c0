"""What tools.convert refuses: one message, nothing written, the source unchanged."""

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from model import GPTConfig
from tests.checkpoints import BYTES, SMALL, assert_same, nanogpt_file, run_folder
from tests.running import command, message, run, start_process
from tools.convert import WRITERS, convert
from tools.convert_read import open_source
from training.errors import CheckpointError, UserError
from training.model_state import TIED


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A folder with a source of each kind, which tests copy."""
    folder = tmp_path_factory.mktemp("kept")
    run_folder(folder / "run")
    for to, name in (("hf", "hf"), ("nanogpt", "ckpt.pt"), ("safetensors", "w.safetensors")):
        convert(str(folder / "run"), folder / name, to)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(
    source: Path | str, folder: Path, to: str = "safetensors", tokenizer: dict[str, Any] | None = BYTES, **options
) -> str:
    """The message; nothing was written in folder."""
    before = contents(folder)
    with pytest.raises(UserError) as error:
        convert(str(source), folder / "target", to, **options, tokenizer=tokenizer)
    assert contents(folder) == before, "something was written"
    assert "\n" not in str(error.value) or "problems in" in str(error.value)
    return str(error.value)


def test_what_is_no_checkpoint_is_described(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"\xff\xd8")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "mp_rank_00_model_states.pt").write_bytes(b"PK")
    torch.save({"state_dict": {}, "epoch": 3}, tmp_path / "other.pt")
    (tmp_path / "text").write_text("weights, somehow")
    text = {
        "none": "none does not exist or is of no known format; give a run folder",
        "empty": "empty does not exist or is of no known format; give a run folder",
        "photos": "photos does not exist or is of no known format",
        "photos/cat.jpg": "cat.jpg does not exist or is of no known format",
        "theirs": "theirs does not exist or is of no known format",
        "other.pt": "other.pt does not describe a GPT (KeyError: 'model')",
        "text": "text does not exist or is of no known format",
    }
    for name, words in text.items():
        assert words in refused(tmp_path / name, tmp_path), name


@pytest.mark.parametrize(
    "name, words",
    [
        ("w.safetensors", "cannot be read"),
        ("ckpt.pt", "cannot be read: "),
        ("hf/model.safetensors", "cannot be read"),
        ("run/checkpoints/step_000003/optimizer.pt", "bytes"),
    ],
)
def test_what_was_cut_off_is_named(kept, tmp_path, name, words):
    copy = tmp_path / name.partition("/")[0]
    (shutil.copytree if (kept / copy.name).is_dir() else shutil.copy)(kept / copy.name, copy)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    text = refused(copy, tmp_path)
    assert path.name in text and words in text
    if copy.is_dir():
        path.unlink()
        text = refused(copy, tmp_path)
        assert path.name in text and any(word in text for word in ("missing", "has no", "damaged")), text


def test_a_part_of_a_sharded_folder_that_is_missing(kept, tmp_path, monkeypatch):
    monkeypatch.setattr("tools.convert.MAX_SHARD_BYTES", 20_000)
    convert(str(kept / "run"), tmp_path / "hf", "hf")
    shard = sorted((tmp_path / "hf").glob("model-*"))[1]
    shard.unlink()
    assert f"hf has no {shard.name} (or model.safetensors.index.json)" in refused(tmp_path / "hf", tmp_path)


def test_another_shape_or_vocabulary_is_told_with_both_numbers(tmp_path):
    args = {name: getattr(SMALL, name) for name in ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size")}
    nanogpt_file(tmp_path / "a.pt", model_args={**args, "vocab_size": 300, "n_layer": 1})
    text = refused(tmp_path / "a.pt", tmp_path)
    assert "transformer.wte.weight is (320, 32), the model's config says (300, 32)" in text
    assert "problems in its parameters: 13" in text and text.endswith("...")
    assert "transformer.h.1.ln_1.weight is (32,), the model's config says no such parameter" in text
    nanogpt_file(tmp_path / "b.pt")
    text = refused(tmp_path / "b.pt", tmp_path, tokenizer={"name": "gpt2"})
    assert "the embedding has 320 rows, fewer than the 50257 ids of 'gpt2'; give another tokenizer" in text
    text = refused(tmp_path / "b.pt", tmp_path, to="train", tokenizer=None)
    assert "does not say which tokenizer it was trained with; give its --dataset" in text
    nanogpt_file(tmp_path / "c.pt", model_args={**args, "n_embd": "wide"})
    assert "does not describe a GPT (TypeError" in refused(tmp_path / "c.pt", tmp_path)


def test_a_pickle_with_code_in_it_is_refused_and_not_run(kept, tmp_path):
    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/harmed",)

    nanogpt_file(tmp_path / "ckpt.pt", optimizer=Payload())
    text = refused(tmp_path / "ckpt.pt", tmp_path)
    assert "it contains posix.system; only tensors and plain data are loaded" in text
    (tmp_path / "bin").mkdir()
    shutil.copy(kept / "hf" / "config.json", tmp_path / "bin")
    torch.save({"wte.weight": Payload()}, tmp_path / "bin" / "pytorch_model.bin")
    assert "it contains posix.system" in refused(tmp_path / "bin", tmp_path)
    assert not (tmp_path / "harmed").exists()


def test_where_a_target_may_not_be(kept, tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.tex").write_text("years")
    messages = {
        kept / "run": "must be outside the source",
        kept / "run" / "inside": "must be outside the source",
        kept: "must be outside the source",
        tmp_path / "none" / "w": f"{tmp_path}/none/w: No such file or directory; nothing was written",
        tmp_path / "work": "is a folder without weights, which --force does not overwrite; remove it yourself",
    }
    for target, words in messages.items():
        with pytest.raises(UserError, match=words):
            convert(str(kept / "run"), target, "train", force=True)
    assert (tmp_path / "work" / "thesis.tex").read_text() == "years"
    with pytest.raises(UserError, match=r"hf exists; --force overwrites it"):
        convert(str(kept / "run"), kept / "hf", "hf")
    with pytest.raises(UserError, match="--to=train stores weights in float32"):
        convert(str(kept / "run"), tmp_path / "t", "train", dtype="bfloat16")


def test_a_ckpt_that_was_packed_again_is_read_right(kept, tmp_path):
    """Deflated, its tensors cannot be mapped; stored, they may lie at other places, and be out of alignment."""
    model, optimizer = nanogpt_file(tmp_path / "ckpt.pt")
    for name, method in (("deflated.pt", zipfile.ZIP_DEFLATED), ("stored.pt", zipfile.ZIP_STORED)):
        with zipfile.ZipFile(tmp_path / "ckpt.pt") as old, zipfile.ZipFile(tmp_path / name, "w", method) as new:
            for entry in old.infolist():
                new.writestr(entry.filename, old.read(entry))
        assert_same(open_source(str(tmp_path / name))[0], model, optimizer)


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"model": [1]}, "AttributeError: 'list' object has no attribute 'items'"),
        ({"model": {"a": "x"}}, "AttributeError: 'str' object has no attribute 'shape'"),
        ({"model_args": None}, "TypeError: "),
        ({"model_args": {"n_head": 5}}, "the model's config says (2295, 768)"),
        ({"iter_num": "x"}, "ValueError: invalid literal for int() with base 10: 'x'"),
        ({"best_val_loss": torch.ones(2)}, "only one element tensors can be converted"),
        ({"optimizer": {"param_groups": [], "state": {99: {}}}}, "IndexError: list index out of range"),
    ],
)
def test_a_ckpt_with_other_contents_is_refused(tmp_path, changes, told):
    nanogpt_file(tmp_path / "ckpt.pt", **changes)
    text = refused(tmp_path / "ckpt.pt", tmp_path)
    assert told in text and "ckpt.pt" in text


@pytest.mark.parametrize("header", [{"model": "[" * 10**5}, {"model": "3"}, {"step": "{"}])
def test_a_header_with_other_contents_is_refused(kept, tmp_path, header):
    with safe_open(kept / "w.safetensors", framework="pt") as file:
        save_file({TIED: torch.ones(1)}, tmp_path / "w.safetensors", {**file.metadata(), **header})
    assert "w.safetensors does not describe a GPT (" in refused(tmp_path / "w.safetensors", tmp_path)


@pytest.mark.parametrize(
    "content, told",
    [
        (b"\xff{", "config.json: is damaged; remove it"),
        (b"{", "config.json: is damaged; remove it"),
        (b"[" * 10**5, "config.json: is damaged; remove it"),
        (b"[1]", "config.json: is damaged; remove it"),
        (b'{"learning_rate": "x"}', "learning_rate = 'x' ("),
        (b'{"beta1": 2.0}', "run/config.json): must be at least 0 and below 1"),
    ],
)
def test_settings_of_a_run_that_cannot_be_used(kept, tmp_path, content, told):
    shutil.copytree(kept / "run", tmp_path / "run")
    (tmp_path / "run" / "config.json").write_bytes(content)
    with pytest.raises(UserError) as error:
        open_source(str(tmp_path / "run"))
    assert told in str(error.value) and "run/config.json" in str(error.value)


@pytest.mark.parametrize("length", [2, 15, 99, 1000, 1685])
def test_a_file_of_torch_before_1_6_that_was_cut_off(tmp_path, length):
    nanogpt_file(tmp_path / "new.pt")
    state = torch.load(tmp_path / "new.pt", weights_only=True)
    torch.save(state, path := tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert open_source(str(path))[0].shapes
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CheckpointError, match=r"old.pt (cannot be read|is damaged|.* of no known format)"):
        open_source(str(path))


def test_nan_is_not_equal(tmp_path):
    nanogpt_file(tmp_path / "ckpt.pt")
    state = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    state["model"]["transformer.ln_f.weight"][3] = math.nan
    torch.save(state, tmp_path / "ckpt.pt")
    told = refused(tmp_path / "ckpt.pt", tmp_path)
    assert "the weight of transformer.ln_f.weight has NaN or inf; convert an earlier checkpoint" in told


def test_the_script_ends_with_one_message(kept, tmp_path):
    """Another architecture, and the hub without a network."""
    about = json.loads((kept / "hf" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**about, "model_type": "opt"}))
    assert "model_type = 'opt': must be one of" in message(
        run("-m", "tools.convert", str(tmp_path), str(tmp_path.parent / "w"))
    )
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    text = message(run("-m", "tools.convert", "gpt2-xl", str(tmp_path / "w"), env=offline))
    assert (
        "'gpt2-xl' is no folder, and cannot be downloaded" in text and "of openai-community/gpt2-xl elsewhere" in text
    )


def test_a_disk_that_gets_full_leaves_nothing(kept, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    try:
        for to in [to for to in WRITERS if to != "hf-mistral"]:  # what a GPT-2 can be written as
            with pytest.raises(UserError, match=os.strerror(errno.ENOSPC)):
                convert(str(kept / "run"), disk / "target", to)
            assert not list(disk.iterdir()), f"{to} left something"
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_one_that_is_ended_leaves_nothing(tmp_path):
    run_folder(tmp_path / "run", GPTConfig(block_size=32, vocab_size=320, n_layer=8, n_head=2, n_embd=256))
    for _ in range(20):  # until it is caught at work
        line = command("-m", "tools.convert", str(tmp_path / "run"), str(tmp_path / "hf"), "--to=hf")
        process = start_process(line, stderr=subprocess.PIPE)
        while process.poll() is None and not list(tmp_path.glob(".hf.unfinished/new/*")):
            time.sleep(0.001)
        process.send_signal(signal.SIGTERM)
        if process.wait(60) == 128 + signal.SIGTERM:
            break
        shutil.rmtree(tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
