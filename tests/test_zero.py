"""ZeRO-0 to 3 with every offload: the loss of one process, exact resume, complete weights."""

import json
import pickle
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoints import weights
from tests.running import ROOT, TINY, command, difference, losses, run, start_process, train, wait_for_step, zero_json
from training.checkpoint import Checkpoints
from training.model_state import open_state

STRATEGIES: list = ["zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"]
STRATEGIES += [pytest.param("zero3_nvme", marks=pytest.mark.needs("libaio"))]
# Clipping, warm-up and cosine, two groups of weight decay, a vocabulary that no number of ranks divides.
SETTINGS: dict[str, Any] = {"max_iters": 30, "lr_decay_iters": 30, "eval_interval": 15, "dropout": 0.1}


WIDER: dict[str, Any] = {"n_layer": 3, "n_embd": 128}  # DeepSpeed does not swap tensors below 1 MB


@pytest.fixture(scope="module")
def single(reference):
    """single(settings): run folder of one process with the same global batch."""
    return lambda **settings: reference(**{**SETTINGS, **settings})


def settings_of(strategy: str, folder: Path) -> dict[str, Any]:
    """NVMe gets a copy of the JSON with smaller buffers, and a model that is large enough to be swapped."""
    if strategy != "zero3_nvme":
        return {"deepspeed_config": zero_json(strategy), **SETTINGS}
    config = json.loads((ROOT / zero_json(strategy)).read_text())
    config["zero_optimization"]["offload_param"]["buffer_size"] = 100_000
    path, disk = folder / "config.json", folder / "disk"
    path.write_text(json.dumps(config))
    disk.mkdir(exist_ok=True)
    return {"deepspeed_config": path, "nvme_path": disk, **SETTINGS, **WIDER}


def killed(out: Path, data: Path, settings: dict[str, Any]) -> None:
    tiny = {**TINY, **settings, "dataset": data, "out_dir": out}
    process = start_process(command("train_deepspeed.py", ranks=2, **tiny), stdout=subprocess.DEVNULL)
    wait_for_step(out, process, 18)
    process.kill()  # its ranks end with it
    assert process.wait() == -signal.SIGKILL
    assert Checkpoints(str(out)).newest()[1]["step"] == 15


def plant(folder: Path, canary: Path) -> None:
    """Add files whose code runs when they are unpickled, under names that sort before those of the checkpoint."""

    class Code:
        def __reduce__(self):
            return canary.touch, ()

    for name in (
        "0_mp_rank_00_model_states.pt",
        "0_zero_pp_rank_0_mp_rank_00_optim_states.pt",
        "zero/optimizer_state.pt",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(pickle.dumps(Code()))


@pytest.fixture(scope="module")
def zero(once, data):
    """zero(strategy): (run folder, settings, output) of 30 steps on 2 ranks, killed after 18 and resumed from step 15.

    before/metrics.jsonl beside the run folder is that of the killed run.
    """

    def settings_in(folder: Path, strategy: str) -> dict[str, Any]:
        return {**settings_of(strategy, folder), "gradient_accumulation_steps": 4}

    def make(folder: Path, strategy: str) -> None:
        settings = settings_in(folder, strategy)
        killed(folder / "out", data, settings)
        (folder / "before").mkdir()
        shutil.copy(folder / "out" / "metrics.jsonl", folder / "before")
        plant(folder / "out" / "checkpoints" / "step_000015", folder / "canary")
        (folder / "output").write_text(train(folder / "out", data, ranks=2, init_from="resume", **settings))

    def trained(strategy: str) -> tuple[Path, dict[str, Any], str]:
        folder = once(f"killed_{strategy}", lambda folder: make(folder, strategy))
        return folder / "out", settings_in(folder, strategy), (folder / "output").read_text()

    return trained


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_trains_as_one_process(single, zero, strategy):
    out, settings, output = zero(strategy)
    assert not (out.parent / "canary").exists(), "a resume has run the code in a file that is no part of the checkpoint"
    if strategy == "zero3_nvme":
        assert list(out.rglob("exp_avg-*.swp")), "nothing was swapped to the disk"
        assert not list(settings["nvme_path"].rglob("*.swp")), "swap files are left on the disk"
    assert f"{strategy}: " in output and "WARNING" not in output and "FutureWarning" not in output
    compare(out, single(gradient_accumulation_steps=4, **(WIDER if strategy == "zero3_nvme" else {})), strategy, 2)


@pytest.mark.parametrize("strategy, ranks, accumulation", [("zero2", 4, 8), ("zero3", 4, 8), ("zero1", 2, 2)])
def test_other_ranks_and_accumulation_train_as_one_process(tmp_path, data, single, strategy, ranks, accumulation):
    half = {"gradient_accumulation_steps": accumulation, "max_iters": 15}
    train(tmp_path / "out", data, ranks=ranks, **{**settings_of(strategy, tmp_path), **half})
    compare(tmp_path / "out", single(**half), strategy, ranks)


def compare(out: Path, one: Path, strategy: str, ranks: int) -> None:
    assert difference(one, out) <= 1e-5 and difference(one, out, "grad_norm") <= 1e-5
    first, *_, last = losses(one).values()
    assert last < first - 0.3, "the model must learn for this comparison to mean anything"
    newest, about = Checkpoints(str(out)).newest()
    assert (about["strategy"], about["world_size"]) == (strategy, ranks)
    ours = weights(open_state(newest, about))
    theirs = weights(open_state(*Checkpoints(str(one)).newest()))
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=0, atol=1e-5)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_killed_run_resumes_exactly(zero, strategy):
    """The steps after the checkpoint are made twice, by the killed run and by the one that resumed it: within 1e-6."""
    resumed = zero(strategy)[0]
    for key in ("loss", "grad_norm"):
        before, after = losses(resumed.parent / "before", key), losses(resumed, key)
        assert max(before) >= 18 and list(after) == list(range(30))
        assert max(abs(after[step] - before[step]) for step in before) <= 1e-6


@pytest.mark.parametrize("strategy", ["zero1", "zero3"])
def test_bf16_stays_near_ddp(tmp_path, data, strategy):
    """DeepSpeed keeps all weights and activations in bf16, layer norms included; autocast only inputs of matmuls."""
    ddp, zero = tmp_path / "ddp", tmp_path / "zero"
    settings: dict[str, Any] = {"dtype": "bfloat16", "gradient_accumulation_steps": 4, "max_iters": 15}
    train(ddp, data, ranks=2, **settings)
    train(zero, data, ranks=2, deepspeed_config=zero_json(strategy), **settings)
    assert 0 < difference(ddp, zero) < 0.02
    given = json.loads((zero / "deepspeed.json").read_text())
    assert given["bf16"]["enabled"] and not given["fp16"]["enabled"]
    assert given["data_types"]["grad_accum_dtype"] == "fp32"


@pytest.mark.parametrize("strategy", ["zero0", "zero2", "zero3"])
def test_torch_autocast_in_bf16_equals_ddp(tmp_path, data, strategy):
    ddp, zero = tmp_path / "ddp", tmp_path / "zero"
    config = json.loads((ROOT / zero_json(strategy)).read_text())
    if strategy != "zero0":  # the default of zero0
        config["torch_autocast"] = {"enabled": True}
        del config["data_types"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    settings: dict[str, Any] = {"dtype": "bfloat16", "gradient_accumulation_steps": 2, "max_iters": 15}
    train(ddp, data, ranks=2, **settings)
    train(zero, data, ranks=2, deepspeed_config=tmp_path / "config.json", **settings)
    assert difference(ddp, zero) < 1e-3


def test_weights_equal_those_read_by_deepspeed(tmp_path, data):
    """A safetensors file of them is a complete state dict."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    from model import GPT, GPTConfig

    for strategy in ("zero2", "zero3"):  # DeepSpeed cannot read its own of stage 1 with fp32 accumulation
        out, file = tmp_path / strategy, tmp_path / f"{strategy}.safetensors"
        settings: dict[str, Any] = {"dtype": "bfloat16", "gradient_accumulation_steps": 3, "max_iters": 5}
        train(out, data, ranks=3, deepspeed_config=zero_json(strategy), **settings)
        done = run("-m", "tools.convert", str(out), str(file))
        assert done.returncode == 0, done.stderr
        ours, theirs = load_file(file), get_fp32_state_dict_from_zero_checkpoint(out / "checkpoints", "step_000005")
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        model = GPT(GPTConfig(**Checkpoints(str(out)).newest()[1]["model"]))
        model.load_state_dict(ours)
        assert run("-m", "tools.convert", str(out), str(file)).returncode == 2, "the file was overwritten"


def test_sampling_reads_every_strategy(single, zero):
    texts = set()
    for folder in (
        single(gradient_accumulation_steps=4),
        *(zero(strategy)[0] for strategy in ("zero0", "zero2", "zero3")),
    ):
        done = run("sample.py", out_dir=folder, num_samples=1, max_new_tokens=20, temperature=0, start="the ")
        assert done.returncode == 0, done.stderr
        texts.add(done.stdout)
    assert len(texts) == 1 and "the " in texts.pop()
