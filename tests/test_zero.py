"""ZeRO-0 to 3 with every offload: the loss of one process, exact resume, weights that are whole."""

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.running import ROOT, TINY, command, difference, losses, run, train, zero_json
from training.checkpoint import Checkpoints
from training.saved_state import open_state

STRATEGIES = ["zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload", "zero3_nvme"]
# Clipping, warm-up and cosine, two groups of weight decay, a vocabulary that no number of ranks divides.
SETTINGS: dict[str, Any] = {"max_iters": 40, "lr_decay_iters": 40, "eval_interval": 20, "dropout": 0.1}


WIDER: dict[str, Any] = {"n_layer": 3, "n_embd": 128}  # DeepSpeed swaps nothing below a megabyte


@pytest.fixture(scope="module")
def single(tmp_path_factory, data):
    """single(settings): the run of one process, with the same global batch."""
    done: dict[tuple, Path] = {}

    def folder(**settings) -> Path:
        key = tuple(sorted(settings.items()))
        if key not in done:
            done[key] = tmp_path_factory.mktemp("single")
            train(done[key], data, **SETTINGS, **settings)
        return done[key]

    return folder


def settings_of(strategy: str, folder: Path) -> dict[str, Any]:
    """For NVMe, a copy of the JSON with smaller buffers, and a model that is large enough to be swapped."""
    if strategy != "zero3_nvme":
        return {"deepspeed_config": zero_json(strategy), **SETTINGS}
    config = json.loads((ROOT / zero_json(strategy)).read_text())
    config["zero_optimization"]["offload_param"]["buffer_size"] = 100_000
    path, disk = folder / "config.json", folder / "disk"
    path.write_text(json.dumps(config))
    disk.mkdir()
    return {"deepspeed_config": path, "nvme_path": disk, **SETTINGS, **WIDER}


def killed(out: Path, data: Path, settings: dict[str, Any]) -> None:
    tiny = {**TINY, **settings, "dataset": data, "out_dir": out}
    process = subprocess.Popen(command("train_deepspeed.py", ranks=2, **tiny), cwd=ROOT, stdout=subprocess.DEVNULL)
    while not (out / "metrics.jsonl").exists() or len(losses(out)) < 22:
        time.sleep(0.005)
        assert process.poll() is None, "it ended before it could be killed"
    process.kill()  # and its ranks with it
    assert process.wait() == -signal.SIGKILL
    assert Checkpoints(str(out)).newest()[1]["step"] == 20


@pytest.fixture(scope="module")
def zero(tmp_path_factory, data):
    """zero(strategy): (run folder, settings, output) of 40 steps on 2 ranks, killed after the save of the 20th."""
    done: dict[str, tuple[Path, dict[str, Any], str]] = {}

    def trained(strategy: str) -> tuple[Path, dict[str, Any], str]:
        if strategy not in done:
            folder = tmp_path_factory.mktemp(strategy)
            settings = {**settings_of(strategy, folder), "gradient_accumulation_steps": 8}
            killed(folder / "out", data, settings)
            output = train(folder / "out", data, ranks=2, init_from="resume", **settings)
            done[strategy] = folder / "out", settings, output
        return done[strategy]

    return trained


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_trains_as_one_process(single, zero, strategy):
    out, settings, output = zero(strategy)
    if strategy == "zero3_nvme":
        assert list(out.rglob("exp_avg-*.swp")), "nothing went to the disk"
        assert not list(settings["nvme_path"].rglob("*.swp")), "something stays on the disk"
    assert f"{strategy}: " in output and "WARNING" not in output and "FutureWarning" not in output
    compare(out, single(gradient_accumulation_steps=8, **(WIDER if strategy == "zero3_nvme" else {})), strategy, 2)


@pytest.mark.parametrize("strategy, ranks, accumulation", [("zero2", 4, 8), ("zero3", 4, 8), ("zero1", 2, 2)])
def test_other_ranks_and_accumulation_train_as_one_process(tmp_path, data, single, strategy, ranks, accumulation):
    settings = {**settings_of(strategy, tmp_path), "gradient_accumulation_steps": accumulation}
    train(tmp_path / "out", data, ranks=ranks, **settings)
    compare(tmp_path / "out", single(gradient_accumulation_steps=accumulation), strategy, ranks)


def compare(out: Path, one: Path, strategy: str, ranks: int) -> None:
    assert difference(one, out) <= 1e-5 and difference(one, out, "grad_norm") <= 1e-5
    assert losses(one)[39] < losses(one)[0] - 0.5, "it learns nothing: this shows nothing"
    newest, about = Checkpoints(str(out)).newest()
    assert (about["strategy"], about["world_size"]) == (strategy, ranks)
    ours = open_state(newest, about).weights()
    theirs = open_state(*Checkpoints(str(one)).newest()).weights()
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=0, atol=1e-5)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_killed_run_goes_on_as_if_nothing_had_been(tmp_path, data, zero, strategy):
    """Nearer than other strategies come: only the order of additions differs there."""
    killed, settings, _ = zero(strategy)
    train(tmp_path, data, ranks=2, **settings)
    assert difference(tmp_path, killed) <= 1e-6 and difference(tmp_path, killed, "grad_norm") <= 1e-6


@pytest.mark.parametrize("strategy", ["zero1", "zero3"])
def test_bf16_stays_near_ddp(tmp_path, data, strategy):
    """DeepSpeed holds the weights, the norms' too, and all activations in bf16; autocast only what matmuls touch."""
    ddp, zero = tmp_path / "ddp", tmp_path / "zero"
    settings: dict[str, Any] = {"dtype": "bfloat16", "gradient_accumulation_steps": 4}
    train(ddp, data, ranks=2, **settings)
    train(zero, data, ranks=2, deepspeed_config=zero_json(strategy), **settings)
    assert 0 < difference(ddp, zero) < 0.02
    given = json.loads((zero / "deepspeed.json").read_text())
    assert given["bf16"]["enabled"] and not given["fp16"]["enabled"]
    assert given["data_types"]["grad_accum_dtype"] == "fp32"


@pytest.mark.parametrize("strategy", ["zero0", "zero2", "zero3"])
def test_autocast_in_bf16_is_what_ddp_has(tmp_path, data, strategy):
    ddp, zero = tmp_path / "ddp", tmp_path / "zero"
    config = json.loads((ROOT / zero_json(strategy)).read_text())
    if strategy != "zero0":  # there it is so by itself
        config["torch_autocast"] = {"enabled": True}
        del config["data_types"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    settings: dict[str, Any] = {"dtype": "bfloat16", "gradient_accumulation_steps": 2}
    train(ddp, data, ranks=2, **settings)
    train(zero, data, ranks=2, deepspeed_config=tmp_path / "config.json", **settings)
    assert difference(ddp, zero) < 1e-3


def test_weights_are_read_as_deepspeed_reads_them(tmp_path, data):
    """And a safetensors file of them is a whole state dict."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    from model import GPT, GPTConfig

    for strategy in ("zero2", "zero3"):  # DeepSpeed cannot read its own of stage 1 with fp32 accumulation
        out, file = tmp_path / strategy, tmp_path / f"{strategy}.safetensors"
        settings: dict[str, Any] = {"dtype": "bfloat16", "gradient_accumulation_steps": 3, "max_iters": 5}
        train(out, data, ranks=3, deepspeed_config=zero_json(strategy), **settings)
        done = run("convert.py", str(out), str(file))
        assert done.returncode == 0, done.stderr
        ours, theirs = load_file(file), get_fp32_state_dict_from_zero_checkpoint(out / "checkpoints", "step_000005")
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        model = GPT(GPTConfig(**Checkpoints(str(out)).newest()[1]["model"]))
        model.load_state_dict(ours)
        assert run("convert.py", str(out), str(file)).returncode == 2, "it was overwritten"


def test_sampling_reads_every_strategy(single, zero):
    texts = set()
    for folder in (
        single(gradient_accumulation_steps=8),
        *(zero(strategy)[0] for strategy in ("zero0", "zero2", "zero3")),
    ):
        done = run("sample.py", out_dir=folder, num_samples=1, max_new_tokens=20, temperature=0, start="the ")
        assert done.returncode == 0, done.stderr
        texts.add(done.stdout)
    assert len(texts) == 1 and "the " in texts.pop()
