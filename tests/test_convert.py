"""convert.py: every format to every other and back, bit by bit."""

import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from model import GPT, GPTConfig
from tests.checkpoints import BYTES, SMALL, STEPS, assert_same, nanogpt_file, run_folder
from tests.running import difference, run, train
from training import files
from training.checkpoint import Checkpoints
from training.errors import UserError
from training.formats import verify
from training.formats.conversion import FORMATS, convert
from training.formats.options import Options
from training.formats.source import open_source

OPTIONS = Options(stage=3, ranks=3, tokenizer=BYTES)
WEIGHTS_ONLY = ("safetensors", "hf")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A run folder, and what is in it."""
    folder = tmp_path_factory.mktemp("runs") / "out"
    return folder, *run_folder(folder)


@pytest.mark.parametrize("first", FORMATS)
def test_each_format_goes_to_each_other(source, tmp_path, first):
    folder, model, optimizer = source
    convert(str(folder), tmp_path / first, first, OPTIONS)
    for second in FORMATS:
        told = convert(str(tmp_path / first), tmp_path / f"{first}-{second}", second, OPTIONS)
        assert "verified: every tensor equal" in told[-1]
        saved, about = open_source(str(tmp_path / f"{first}-{second}"), OPTIONS)
        kept = not {first, second} & set(WEIGHTS_ONLY)
        assert_same(saved, model, optimizer if kept else None)
        assert GPTConfig(**about["model"]) == SMALL
        if first in WEIGHTS_ONLY and second not in WEIGHTS_ONLY:
            assert "AdamW's moments are zero, and its steps 0" in told[1]
            assert saved.step == 0 and not saved.whole("transformer.ln_f.bias", "exp_avg_sq").any()
        if kept:
            assert (about["step"], about["best_val_loss"]) == (STEPS, 1.5)
    assert not list(tmp_path.glob(".*")), "something unfinished was left"


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 3, 4])
def test_deepspeeds_partitions_are_read_back_whole(source, tmp_path, stage, ranks):
    folder, model, optimizer = source
    for dtype in ("float32", "bfloat16"):
        options = replace(OPTIONS, stage=stage, ranks=ranks, dtype=dtype)
        convert(str(folder), tmp_path / dtype, "deepspeed", options)
        path, about = Checkpoints(str(tmp_path / dtype)).newest()
        assert (about["strategy"], about["world_size"], about["dtype"]) == (f"zero{stage}", ranks, dtype)
        assert len(list(path.glob(f"{'bf16_' * (dtype == 'bfloat16')}zero_pp_rank_*_optim_states.pt"))) == ranks
        assert_same(open_source(str(tmp_path / dtype), OPTIONS)[0], model, optimizer)


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod."])
def test_nanogpts_checkpoint_with_its_prefixes(tmp_path, prefix):
    model, optimizer = nanogpt_file(tmp_path / "ckpt.pt", prefix=prefix)
    saved, about = open_source(str(tmp_path), OPTIONS)
    assert_same(saved, model, optimizer)
    assert (about["step"], about["best_val_loss"], about["settings"]["beta2"]) == (STEPS, 1.5, 0.99)
    convert(str(tmp_path / "ckpt.pt"), tmp_path / "back.pt", "nanogpt", OPTIONS)
    again = files.read(tmp_path / "back.pt")
    groups = again["optimizer"]["param_groups"]
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0] and groups[0]["betas"] == (0.9, 0.99)
    theirs = torch.optim.AdamW([{"params": group["params"]} for group in optimizer.param_groups], lr=9.0)
    theirs.load_state_dict(again["optimizer"])
    assert theirs.param_groups[1]["lr"] == 1e-3
    assert again["model"]["lm_head.weight"].data_ptr() == again["model"]["transformer.wte.weight"].data_ptr()


def test_a_run_goes_on_from_what_was_converted(source, tmp_path, data):
    """By train.py, as it would have gone on where it came from."""
    folder, *_ = source
    settings: dict[str, Any] = {"bias": True, "max_iters": STEPS + 2, "init_from": "resume"}
    convert(str(folder), tmp_path / "u", "universal", OPTIONS)
    convert(str(tmp_path / "u"), tmp_path / "run", "train", OPTIONS)
    output = train(tmp_path / "run", data, **settings)
    train(shutil.copytree(folder, tmp_path / "own"), data, **settings)
    assert difference(tmp_path / "own", tmp_path / "run") == 0
    assert f"resuming {tmp_path}/run/checkpoints/step_000003" in output
    saved, _ = open_source(str(tmp_path / "run"), OPTIONS)
    assert saved.step == STEPS + 2


def test_weights_in_half_precision_are_the_rounded_ones(source, tmp_path):
    folder, model, _ = source
    told = convert(str(folder), tmp_path / "w", "safetensors", replace(OPTIONS, dtype="bfloat16"))
    assert ", bfloat16, " in told[0] and "every tensor equal" in told[-1]
    for name, weight in load_file(tmp_path / "w").items():
        assert torch.equal(weight, model.state_dict()[name].bfloat16()), name


def test_the_padding_of_a_vocabulary_is_cut_where_it_is_asked_for(source, tmp_path):
    folder, model, optimizer = source
    convert(str(folder), tmp_path / "cut", "train", replace(OPTIONS, vocab=257))
    saved, about = open_source(str(tmp_path / "cut"), OPTIONS)
    assert about["model"]["vocab_size"] == 257
    embedding = model.transformer.wte.weight
    assert torch.equal(saved.whole("transformer.wte.weight"), embedding[:257])
    moment = optimizer.state[embedding]["exp_avg"]
    assert torch.equal(saved.whole("transformer.wte.weight", "exp_avg"), moment[:257])
    for vocab in (256, 321):
        with pytest.raises(
            UserError, match=f"--vocab={vocab}: the embedding has 320 rows, for 257 ids; keep 257 to 320"
        ):
            convert(str(folder), tmp_path / "no", "train", replace(OPTIONS, vocab=vocab))


def test_logits_by_the_block_are_the_models(source):
    folder, model, _ = source
    tokens = torch.randint(320, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(verify.logits(open_source(str(folder), OPTIONS)[0], SMALL, tokens), model(tokens))


def test_a_wrong_target_is_noticed(source, tmp_path):
    saved, _ = open_source(str(source[0]), OPTIONS)
    for name, kind in (("transformer.h.1.mlp.c_fc.bias", "weight"), ("transformer.wpe.weight", "exp_avg_sq")):
        pieces = {**saved.pieces, (name, kind): [saved.whole(name, kind).flatten() + 1e-9]}
        with pytest.raises(verify.NotEqual, match=f"the {kind} of {name} is another one"):
            verify.tensors(saved, replace(saved, pieces=pieces), FORMATS["train"].KINDS, torch.float32)
    with pytest.raises(verify.NotEqual, match="4 steps, not 3"):
        verify.tensors(saved, replace(saved, step=4.0), FORMATS["train"].KINDS, torch.float32)


def test_the_command(source, tmp_path):
    folder, model, _ = source
    file = tmp_path / "small.safetensors"
    done = run("convert.py", str(folder), str(file))
    assert done.returncode == 0, done.stderr
    head, *notes = done.stdout.splitlines()
    count = f"{SMALL.parameter_count():,} parameters of {folder}/checkpoints/step_000003, float32"
    assert head == f"{file}: {count}, {file.stat().st_size:,} bytes"
    assert notes[0] == "  AdamW's moments stay behind: the format holds weights only"
    again = GPT(SMALL)
    again.load_state_dict(load_file(file))
    assert torch.equal(again.transformer.wte.weight, model.transformer.wte.weight)
    before = file.read_bytes()
    for force, status in (((), 2), (("--force", "--dtype=float16"), 0)):
        assert run("convert.py", str(folder), str(file), *force).returncode == status
        assert (file.read_bytes() == before) == (status == 2)
