"""What convert.py refuses: one message, nothing written, the source as it was."""

import errno
import json
import os
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.checkpoints import BYTES, SMALL, nanogpt_file, run_folder
from tests.running import ROOT, command, message, run
from training.errors import UserError
from training.formats import torch_file
from training.formats.conversion import convert
from training.formats.options import Options

OPTIONS = Options(ranks=2, tokenizer=BYTES)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A folder with a source of each kind, which tests copy."""
    folder = tmp_path_factory.mktemp("kept")
    run_folder(folder / "run")
    for to, name in (("hf", "hf"), ("nanogpt", "ckpt.pt"), ("safetensors", "w.safetensors"), ("universal", "u")):
        convert(str(folder / "run"), folder / name, to, OPTIONS)
    convert(str(folder / "run"), folder / "zero", "deepspeed", OPTIONS)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(source: Path | str, folder: Path, to: str = "safetensors", **options) -> str:
    """The message; nothing was written in folder."""
    before = contents(folder)
    with pytest.raises(UserError) as error:
        convert(str(source), folder / "target", to, replace(OPTIONS, **options))
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
    told = {
        "none": "there is no such file or folder; what can be read is a run folder",
        "empty": "is an empty folder",
        "photos": "holds cat.jpg",
        "photos/cat.jpg": r"is a file of 2 bytes that begins with b'\xff\xd8'",
        "theirs": "is a checkpoint of DeepSpeed, without the checkpoint.json that train_deepspeed.py writes beside it",
        "other.pt": "holds 'state_dict', 'epoch'; nanoGPT's ckpt.pt has 'model', 'model_args' and 'optimizer'",
        "text": "begins with b'weights,'",
    }
    for name, words in told.items():
        assert words in refused(tmp_path / name, tmp_path), name


@pytest.mark.parametrize(
    "name, words",
    [
        ("w.safetensors", "cannot be read"),
        ("ckpt.pt", "cannot be read"),
        ("hf/model.safetensors", "cannot be read"),
        ("run/checkpoints/step_000003/optimizer.pt", "bytes"),
        ("zero/checkpoints/step_000003/zero_pp_rank_1_mp_rank_00_optim_states.pt", "bytes"),
        ("u/step_000003/zero/transformer.wte.weight/exp_avg.pt", "bytes"),
    ],
)
def test_what_was_cut_off_is_named(kept, tmp_path, name, words):
    copy = tmp_path / name.partition("/")[0]
    (shutil.copytree if (kept / copy.name).is_dir() else shutil.copy)(kept / copy.name, copy)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    told = refused(copy, tmp_path)
    assert path.name in told and words in told
    if copy.is_dir():
        path.unlink()
        told = refused(copy, tmp_path)
        assert path.name in told and any(word in told for word in ("missing", "no weights", "damaged")), told


def test_a_part_of_a_sharded_folder_that_is_missing(kept, tmp_path):
    convert(str(kept / "run"), tmp_path / "hf", "hf", replace(OPTIONS, max_shard_size=2e4))
    shard = sorted((tmp_path / "hf").glob("model-*"))[1]
    shard.unlink()
    assert f"lacks {shard.name}, one of" in refused(tmp_path / "hf", tmp_path)


def test_another_shape_or_vocabulary_is_told_with_both_numbers(tmp_path):
    args = {name: getattr(SMALL, name) for name in ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size")}
    nanogpt_file(tmp_path / "a.pt", model_args={**args, "vocab_size": 300, "n_layer": 1})
    told = refused(tmp_path / "a.pt", tmp_path)
    assert "transformer.wte.weight has shape (320, 32), the model's config says (300, 32)" in told
    assert "13 problems in its parameters" in told and told.endswith("...")
    assert "transformer.h.1.ln_1.weight is no parameter of the model" in told
    nanogpt_file(tmp_path / "b.pt")
    told = refused(tmp_path / "b.pt", tmp_path, tokenizer={"name": "gpt2"})
    assert "its embedding has 320 rows, 'gpt2' has 50257 ids; name another tokenizer" in told
    told = refused(tmp_path / "b.pt", tmp_path, to="train", tokenizer=None)
    assert "does not say which tokenizer its 320 ids are of: give --tokenizer=gpt2" in told
    nanogpt_file(tmp_path / "c.pt", model_args={**args, "n_embd": "wide"})
    assert "is of no model that is known here" in refused(tmp_path / "c.pt", tmp_path)


def test_a_pickle_with_code_in_it_is_refused_and_not_run(kept, tmp_path):
    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/harmed",)

    nanogpt_file(tmp_path / "ckpt.pt", optimizer=Payload())
    told = refused(tmp_path / "ckpt.pt", tmp_path)
    assert "it asks for posix.system, and whatever code that runs; only tensors and plain data are read" in told
    (tmp_path / "bin").mkdir()
    shutil.copy(kept / "hf" / "config.json", tmp_path / "bin")
    torch.save({"wte.weight": Payload()}, tmp_path / "bin" / "pytorch_model.bin")
    assert "it asks for posix.system" in refused(tmp_path / "bin", tmp_path)
    foreign = torch_file.foreign("subprocess.Popen")
    torch_file.save(tmp_path / "x.pt", {"model": foreign(args="true")})
    assert "it asks for subprocess.Popen" in refused(tmp_path / "x.pt", tmp_path)
    assert not (tmp_path / "harmed").exists()


def test_where_a_target_may_not_be(kept, tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.tex").write_text("years")
    told = {
        kept / "run": "must be another place than",
        kept / "run" / "inside": "must be another place than",
        kept: "must be another place than",
        tmp_path / "none" / "w": f"there is no folder {tmp_path}/none; make it first",
        tmp_path / "work": "is a folder of something else than weights; --force overwrites none of those",
    }
    for target, words in told.items():
        with pytest.raises(UserError, match=words.replace(";", ".")):
            convert(str(kept / "run"), target, "train", OPTIONS, force=True)
    assert (tmp_path / "work" / "thesis.tex").read_text() == "years"
    with pytest.raises(UserError, match=r"u exists; --force overwrites it"):
        convert(str(kept / "run"), kept / "u", "universal", OPTIONS)
    with pytest.raises(UserError, match="--to=train holds float32"):
        convert(str(kept / "run"), tmp_path / "t", "train", replace(OPTIONS, dtype="bfloat16"))
    with pytest.raises(UserError, match="stages are 1 to 3, ranks 1 or more"):
        convert(str(kept / "run"), tmp_path / "t", "deepspeed", replace(OPTIONS, stage=4))


def test_the_script_ends_with_one_message(kept, tmp_path):
    """Another architecture, and the hub without a network."""
    about = json.loads((kept / "hf" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**about, "model_type": "llama"}))
    assert "is of a 'llama' model" in message(run("convert.py", str(tmp_path), str(tmp_path.parent / "w")))
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    told = message(run("convert.py", "gpt2-xl", str(tmp_path / "w"), env=offline))
    assert "'gpt2-xl' cannot be downloaded" in told and "of openai-community/gpt2-xl elsewhere" in told


def test_a_disk_that_gets_full_leaves_nothing(kept, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    try:
        for to in ("safetensors", "hf", "nanogpt", "train", "deepspeed", "universal"):
            with pytest.raises(UserError, match=os.strerror(errno.ENOSPC)):
                convert(str(kept / "run"), disk / "target", to, OPTIONS)
            assert not list(disk.iterdir()), f"{to} left something"
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_one_that_is_ended_leaves_nothing(tmp_path):
    run_folder(tmp_path / "run", replace(SMALL, n_layer=8, n_embd=256))
    for _ in range(20):  # until it is caught at work
        words = command("convert.py", str(tmp_path / "run"), str(tmp_path / "u"), "--to=universal")
        process = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE)
        while process.poll() is None and not list(tmp_path.glob(".u.unfinished/*/zero/*")):
            time.sleep(0.001)
        process.send_signal(signal.SIGTERM)
        if process.wait(60) == 128 + signal.SIGTERM:
            break
        shutil.rmtree(tmp_path / "u")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
