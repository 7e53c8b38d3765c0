"""examples/hf_trainer.py: the Trainer of `transformers` with our JSONs as they are, launched on 2 CPU ranks."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from data.dataset import open_dataset
from examples import hf_trainer
from tests.running import message, run, zero_json
from training.errors import UserError
from training.formats.options import Options
from training.formats.source import open_source

EXAMPLE = "examples/hf_trainer.py"
# Two micro-steps, and a warm-up, so that neither is left to the defaults.
SETTINGS: dict[str, Any] = {"learning_rate": 5e-3, "max_steps": 20, "warmup_steps": 5, "logging_steps": 1}
SETTINGS |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "block_size": 32}


@pytest.fixture(scope="module")
def begin(tmp_path_factory) -> Path:
    """Weights to begin with: those of a new model, `transformers` draws in another order under ZeRO-3."""
    torch.manual_seed(0)
    about: dict[str, Any] = {"vocab_size": 257, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 2}
    about |= dict.fromkeys(("bos_token_id", "eos_token_id"), 256)
    about |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    folder = tmp_path_factory.mktemp("begin")
    GPT2LMHeadModel(GPT2Config(**about)).save_pretrained(folder)
    return folder


def trained(out: Path, data: Path, **settings) -> list[float]:
    """The losses of a run of the example."""
    done = run(EXAMPLE, ranks=2, **{**SETTINGS, "dataset": data, "output_dir": out, **settings})
    assert done.returncode == 0, done.stderr
    log = json.loads((out / "trainer_state.json").read_text())["log_history"]
    losses = [row["loss"] for row in log if "loss" in row]
    lines = [f"step {step}: loss {loss:.4f}" for step, loss in enumerate(losses, start=1)]
    assert [line for line in done.stdout.splitlines() if not line.startswith("compiling ")] == lines
    assert not done.stderr
    return losses


@pytest.fixture(scope="module")
def ddp(tmp_path_factory, data, begin) -> list[float]:
    return trained(tmp_path_factory.mktemp("ddp"), data, model=begin)


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3", "zero3_offload"])
def test_the_trainer_takes_our_jsons_as_they_are(tmp_path, data, begin, ddp, strategy):
    """To the loss that it has without DeepSpeed: the same batches, clipping, AdamW and schedule."""
    losses = trained(tmp_path, data, model=begin, deepspeed=zero_json(strategy))
    assert len(losses) == 20 and losses[-1] < losses[0] - 1
    assert losses == pytest.approx(ddp, rel=0, abs=1e-5)
    begun, ended = (open_source(str(folder), Options())[0] for folder in (begin, tmp_path))
    assert begun.shapes == ended.shapes
    assert not any(torch.equal(begun.whole(name), ended.whole(name)) for name in begun.shapes)


def test_a_new_model_is_trained_in_partitions_and_converted_to_a_run(tmp_path, data):
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 32, "dropout": 0.1}
    losses = trained(tmp_path / "hf", data, deepspeed=zero_json("zero3"), **sizes)
    assert losses[-1] < losses[0] - 1
    done = run("convert.py", str(tmp_path / "hf"), str(tmp_path / "run"), to="train", tokenizer="byte")
    assert done.returncode == 0 and "every tensor equal" in done.stdout, done.stderr
    done = run("sample.py", out_dir=tmp_path / "run", num_samples=1, max_new_tokens=20, start="the ")
    assert done.returncode == 0 and done.stdout.startswith("the "), done.stderr


def test_the_ranks_tell_a_users_error_once(tmp_path):
    told = message(run(EXAMPLE, ranks=2, dataset="shakespear", deepspeed=zero_json("zero3"), output_dir=tmp_path))
    assert told.startswith("there is no data set data/shakespear; did you mean shakespeare?")


@pytest.mark.parametrize(
    "wrong, told",
    [
        ({"deepspeed": "zero2.json"}, "Received: zero2.json; --help lists all arguments"),
        ({"learningrate": 1}, "['--learningrate=1']; --help lists all arguments"),
        ({"max_steps": "x"}, "argument --max_steps/--max-steps: invalid int value: 'x'; --help lists all arguments"),
        ({"fp16": True, "bf16": True}, "At most one of fp16 and bf16 can be True"),
        ({"model": "{none}"}, "model = '{none}': cannot be loaded ("),
        ({"block_size": 33}, "block_size = 33: {begin} has 32 positions; set at most that"),
        ({"dataset": "{large}"}, "has 300 ids, {begin} knows 257; prepare it with the tokenizer of the model"),
    ],
)
def test_what_a_user_gets_wrong(tmp_path, data, begin, make_data, monkeypatch, wrong, told):
    names = {"begin": begin, "none": tmp_path / "none", "large": make_data([0, 299] * 100, vocab_size=300)}
    given = {**SETTINGS, "dataset": data, "output_dir": tmp_path, "model": begin, **wrong}
    line = [EXAMPLE, *(f"--{k}={v}".format(**names) for k, v in given.items())]
    monkeypatch.setattr("sys.argv", line)
    with pytest.raises(UserError, match=re.escape(told.format(**names))):
        settings, _ = hf_trainer.read_arguments(torch.device("cpu"))
        hf_trainer.build(settings, open_dataset(Path(settings.dataset)))


def test_without_transformers_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(hf_trainer, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs transformers and accelerate: pip install"):
        hf_trainer.main()
