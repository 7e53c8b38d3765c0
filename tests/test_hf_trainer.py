"""tests/hf_trainer.py on 2 CPU ranks: the Hugging Face Trainer with our DeepSpeed JSONs, unchanged."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from tests.running import message, run, zero_json

EXAMPLE = "tests/hf_trainer.py"
# Two micro-steps and a warm-up, so that both are tested with other values than the defaults.
SETTINGS: dict[str, Any] = {"learning_rate": 5e-3, "max_steps": 12, "warmup_steps": 3, "logging_steps": 1}
SETTINGS |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "block_size": 32}


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """Initial weights, because transformers initializes a new model in another order under ZeRO-3."""
    torch.manual_seed(0)
    config: dict[str, Any] = {"vocab_size": 257, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 2}
    config |= dict.fromkeys(("bos_token_id", "eos_token_id"), 256)
    config |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    folder = tmp_path_factory.mktemp("weights")
    GPT2LMHeadModel(GPT2Config(**config)).save_pretrained(folder)
    return folder


def trained(out: Path, data: Path, **settings) -> list[float]:
    """The losses of a run of the example."""
    done = run(EXAMPLE, ranks=2, **{**SETTINGS, "dataset": data, "output_dir": out, **settings})
    assert done.returncode == 0, done.stderr
    log = json.loads((out / "trainer_state.json").read_text())["log_history"]
    losses = [row["loss"] for row in log if "loss" in row]
    assert done.stdout.count("'loss': ") == len(losses), "printed once per rank"
    return losses


@pytest.fixture(scope="module")
def ddp(tmp_path_factory, data, weights) -> list[float]:
    return trained(tmp_path_factory.mktemp("ddp"), data, model=weights)


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3", "zero3_offload"])
def test_the_trainer_takes_our_jsons_as_they_are(tmp_path, data, weights, ddp, strategy):
    """The losses are those of DDP: batches, clipping, AdamW and schedule are the same."""
    losses = trained(tmp_path, data, model=weights, deepspeed=zero_json(strategy))
    assert len(losses) == 12 and losses[-1] < losses[0] - 0.5
    assert losses == pytest.approx(ddp, rel=0, abs=1e-5)
    before, after = load_file(weights / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys() - {"lm_head.weight"}  # tied; the Trainer saves it again below ZeRO-3
    assert not any(torch.equal(before[name], after[name]) for name in before), "not trained"


def test_a_new_model_is_trained_in_partitions_and_converted_to_a_run(tmp_path, data):
    losses = trained(tmp_path / "hf", data, deepspeed=zero_json("zero3"))
    assert losses[-1] < losses[0] - 0.5
    done = run("-m", "tools.convert", str(tmp_path / "hf"), str(tmp_path / "run"), to="train", dataset=data)
    assert done.returncode == 0 and "every tensor equal" in done.stdout, done.stderr
    done = run("sample.py", out_dir=tmp_path / "run", num_samples=1, max_new_tokens=20, start="the ")
    assert done.returncode == 0 and done.stdout.startswith("the "), done.stderr


def test_a_users_error_is_printed_once(tmp_path):
    error = message(run(EXAMPLE, ranks=2, dataset="shakespear", deepspeed=zero_json("zero3"), output_dir=tmp_path))
    assert re.match("there is no data set /.*/data/shakespear; did you mean shakespeare[?]", error)


@pytest.mark.parametrize("wrong", [{"block_size": 33}, {"dataset": "large"}])
def test_a_model_that_does_not_fit(tmp_path, data, weights, make_data, wrong):
    if "dataset" in wrong:
        wrong = {"dataset": make_data([0, 299] * 100, vocab_size=300)}
    done = run(EXAMPLE, **{**SETTINGS, "dataset": data, "output_dir": tmp_path, "model": weights, **wrong})
    last = f"\nerror: model = '{weights}': lower block_size to 32, the data set's ids to 257\n"  # after a bar of theirs
    assert done.returncode == 2 and done.stderr.endswith(last) and "Traceback" not in done.stderr, done.stderr
