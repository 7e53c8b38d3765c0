"""tools.convert: every format to every other and back, bit-identical."""

import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from model import GPT, GPTConfig
from tests.checkpoints import BYTES, SMALL, STEPS, assert_same, nanogpt_file, run_folder
from tests.running import difference, run, train, zero_json
from tools.convert import WRITERS, compare_tensors, convert
from tools.convert_read import open_source
from training.checkpoint import Checkpoints
from training.errors import UserError
from training.model_state import read_torch_file

WEIGHTS_ONLY = ("safetensors", "hf")
GPT2_WRITERS = [to for to in WRITERS if to != "hf-mistral"]  # that one is in test_families.py


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A run folder, and the model and optimizer in it."""
    folder = tmp_path_factory.mktemp("runs") / "out"
    return folder, *run_folder(folder)


@pytest.mark.parametrize("first", GPT2_WRITERS)
def test_each_format_to_each_other(source, tmp_path, first):
    folder, model, optimizer = source
    convert(str(folder), tmp_path / first, first)
    for second in GPT2_WRITERS:
        lines = convert(str(tmp_path / first), tmp_path / f"{first}-{second}", second, tokenizer=BYTES)
        assert "verified: every tensor equal" in lines[-1]
        saved, metadata = open_source(str(tmp_path / f"{first}-{second}"), BYTES)
        has_optimizer_state = not {first, second} & set(WEIGHTS_ONLY)
        assert_same(saved, model, optimizer if has_optimizer_state else None)
        assert GPTConfig(**metadata["model"]) == SMALL
        if first in WEIGHTS_ONLY and second not in WEIGHTS_ONLY:
            assert "AdamW starts at step 0 with zero moments" in lines[1]
            assert not saved.step and not saved.kinds
        if has_optimizer_state:
            assert (metadata["step"], metadata["best_val_loss"]) == (STEPS, 1.5)
    assert not list(tmp_path.glob(".*")), "something unfinished was left"


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod."])
def test_nanogpts_checkpoint_with_its_prefixes(tmp_path, prefix):
    model, optimizer = nanogpt_file(tmp_path / "ckpt.pt", prefix=prefix)
    saved, metadata = open_source(str(tmp_path))
    assert_same(saved, model, optimizer)
    assert (metadata["step"], metadata["best_val_loss"], metadata["settings"]["beta2"]) == (STEPS, 1.5, 0.99)
    convert(str(tmp_path / "ckpt.pt"), tmp_path / "back.pt", "nanogpt")
    again = read_torch_file(tmp_path / "back.pt")
    groups = again["optimizer"]["param_groups"]
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0] and groups[0]["betas"] == (0.9, 0.99)
    theirs = torch.optim.AdamW([{"params": group["params"]} for group in optimizer.param_groups], lr=9.0)
    theirs.load_state_dict(again["optimizer"])
    assert theirs.param_groups[1]["lr"] == 1e-3
    for parameter, state in optimizer.state.items():
        assert torch.equal(theirs.state[parameter]["exp_avg_sq"], state["exp_avg_sq"])
    steps = [state["step"] for state in again["optimizer"]["state"].values()]
    assert len({step.data_ptr() for step in steps}) == len(steps), "AdamW would add to one step for each parameter"
    assert again["model"]["lm_head.weight"].data_ptr() == again["model"]["transformer.wte.weight"].data_ptr()


def test_a_run_resumes_from_what_was_converted(source, tmp_path, data):
    """The losses are those of the original run, resumed."""
    folder, *_ = source
    settings: dict[str, Any] = {"bias": True, "max_iters": STEPS + 2, "init_from": "resume"}
    convert(str(folder), tmp_path / "nanogpt", "nanogpt")
    convert(str(tmp_path / "nanogpt"), tmp_path / "run", "train", tokenizer=BYTES)
    output = train(tmp_path / "run", data, **settings)
    train(shutil.copytree(folder, tmp_path / "own"), data, **settings)
    assert difference(tmp_path / "own", tmp_path / "run") == 0
    assert f"resuming {tmp_path}/run/checkpoints/step_000003" in output
    assert open_source(str(tmp_path / "run"))[0].step == STEPS + 2


def test_zero_starts_from_weights_without_optimizer_state(source, tmp_path, data):
    """With a new AdamW: the losses are those of one process that starts from them, too."""
    settings: dict[str, Any] = {"bias": True, "max_iters": STEPS + 2, "init_from": "resume", "learning_rate": 1e-2}
    settings |= {"gradient_accumulation_steps": 2, "warmup_iters": 0}
    convert(str(source[0]), tmp_path / "w", "safetensors")
    convert(str(tmp_path / "w"), tmp_path / "zero", "train", tokenizer=BYTES)
    train(shutil.copytree(tmp_path / "zero", tmp_path / "one"), data, **settings)
    train(tmp_path / "zero", data, ranks=2, deepspeed_config=zero_json("zero3"), **settings)
    assert difference(tmp_path / "one", tmp_path / "zero") <= 1e-5


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
def test_deepspeeds_partitions_are_read(tmp_path, data, strategy):
    """Partitions of 2 ranks hold the same as a run folder of whole tensors made from them."""
    settings: dict[str, Any] = {"ranks": 2, "gradient_accumulation_steps": 2, "max_iters": 2, "eval_iters": 1}
    train(tmp_path / "zero", data, deepspeed_config=zero_json(strategy), **settings)
    convert(str(tmp_path / "zero"), tmp_path / "run", "train")
    partitions, whole = (open_source(str(tmp_path / name))[0] for name in ("zero", "run"))
    assert partitions.step == whole.step == 2
    for name, kind in whole.pieces:
        assert torch.equal(partitions.whole(name, kind), whole.whole(name, kind))
    assert Checkpoints(str(tmp_path / "run")).newest()[1]["strategy"] == "single"


@pytest.mark.parametrize("strategy, tied", [("zero2", True), ("zero3", False)])
def test_universal_checkpoints_are_read(tmp_path, data, monkeypatch, strategy, tied):
    """DeepSpeed's own ds_to_universal makes one from the partitions of a run."""
    from deepspeed.checkpoint import ds_to_universal

    settings: dict[str, Any] = {"ranks": 2, "gradient_accumulation_steps": 2, "max_iters": 2, "eval_iters": 1}
    settings |= {"tied": tied}
    train(tmp_path / "zero", data, deepspeed_config=zero_json(strategy), **settings)
    checkpoint, universal = tmp_path / "zero" / "checkpoints" / "step_000002", tmp_path / "universal"
    arguments = ["--input_folder", str(checkpoint), "--output_folder", str(universal), "--inject_missing_state"]
    arguments += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    monkeypatch.setattr("sys.argv", ["ds_to_universal", *arguments])
    ds_to_universal.main(ds_to_universal.parse_arguments())
    with pytest.raises(UserError, match=r"checkpoint.json cannot be read .*; copy that of the run's checkpoint"):
        open_source(str(universal))
    shutil.copy(checkpoint / "checkpoint.json", universal)
    assert (tmp_path / "latest_universal").read_text() == "universal"  # written by DeepSpeed
    expected, saved = open_source(str(tmp_path / "zero"))[0], open_source(str(tmp_path))[0]
    assert saved.step == expected.step == 2 and saved.kinds == ("exp_avg", "exp_avg_sq")
    for name, kind in expected.pieces:
        assert torch.equal(saved.whole(name, kind), expected.whole(name, kind)), f"{kind} of {name}"


def test_weights_in_half_precision_are_rounded(source, tmp_path):
    folder, model, _ = source
    lines = convert(str(folder), tmp_path / "w", "safetensors", dtype="bfloat16")
    assert lines[0].endswith(", bfloat16") and "every tensor equal" in lines[-1]
    for name, weight in load_file(tmp_path / "w").items():
        assert torch.equal(weight, model.state_dict()[name].bfloat16()), name


@pytest.mark.parametrize("dtype, value", [(torch.float16, 1e5), (torch.float16, 3.4e38), (torch.bfloat16, 3.4e38)])
def test_weights_too_large_for_half_precision_are_refused(tmp_path, dtype, value):
    model, _ = run_folder(tmp_path / "run")
    with torch.no_grad():
        model.get_parameter("transformer.ln_f.bias")[3] = value
    torch.save({"model": model.state_dict(), "model_args": vars(SMALL)}, tmp_path / "ckpt.pt")
    shown = f"{value:.1e}".replace("+", r"\+")
    for to in WEIGHTS_ONLY:
        with pytest.raises(UserError, match=rf"transformer.ln_f.bias has values up to {shown}, too large for {dtype}"):
            convert(str(tmp_path / "ckpt.pt"), tmp_path / "w", to, dtype=str(dtype).removeprefix("torch."))
    assert "every tensor equal" in convert(str(tmp_path / "ckpt.pt"), tmp_path / "w", "safetensors")[-1]
    saved, rounded = open_source(str(tmp_path / "ckpt.pt"))[0], open_source(str(tmp_path / "run"))[0]
    with pytest.raises(UserError, match=r"verification failed, .*the weight of .* differs"):
        compare_tensors(saved, rounded, dtype)  # the source is not blamed


def test_verification_finds_a_wrong_target(source):
    saved, _ = open_source(str(source[0]))
    for name, kind in (("transformer.h.1.mlp.c_fc.bias", "weight"), ("transformer.wpe.weight", "exp_avg_sq")):
        pieces = {**saved.pieces, (name, kind): [saved.whole(name, kind).flatten() + 1e-9]}
        with pytest.raises(UserError, match=f"the {kind} of {name} differs"):
            compare_tensors(saved, replace(saved, pieces=pieces), torch.float32)
    with pytest.raises(UserError, match=r"the optimizer has made 4.0 steps, not 3.0"):
        compare_tensors(saved, replace(saved, step=4.0), torch.float32)


def test_the_command(source, tmp_path):
    folder, model, _ = source
    file = tmp_path / "small.safetensors"
    done = run("-m", "tools.convert", str(folder), str(file))
    assert done.returncode == 0, done.stderr
    head, *notes = done.stdout.splitlines()
    count = f"{SMALL.parameter_count():,} parameters of {folder}/checkpoints/step_000003, float32"
    assert head == f"{file}: {count}"
    assert notes[0] == "  the optimizer state is left out: the format stores weights only"
    again = GPT(SMALL)
    again.load_state_dict(load_file(file))
    assert torch.equal(again.transformer.wte.weight, model.transformer.wte.weight)
    before = file.read_bytes()
    for force, status in (((), 2), (("--force", "--dtype=bfloat16"), 0)):
        assert run("-m", "tools.convert", str(folder), str(file), *force).returncode == status
        assert (file.read_bytes() == before) == (status == 2)
