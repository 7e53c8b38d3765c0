"""Runs on a GPU: the losses of the CPU, half precision, the device that is named, memory, sampling."""

import math
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.running import ROOT, difference, losses, rows, run, train, zero_json

SETTINGS: dict[str, Any] = {"max_iters": 10, "lr_decay_iters": 10, "tf32": False}
CUDA: dict[str, Any] = {**SETTINGS, "device": "cuda:0"}
NOT_FORKED = {"DS_ACCELERATOR": "cuda"}  # the server that ranks are forked from has imported DeepSpeed for CPUs


@pytest.fixture(scope="module")
def on_cpu(reference):
    return reference(**SETTINGS)


@pytest.fixture(scope="module")
def on_gpu(once, data):
    return once("on_gpu", lambda folder: train(folder, data, **CUDA, dtype="float32"))


def test_fp32_losses_are_those_of_the_cpu(on_cpu, on_gpu):
    assert difference(on_cpu, on_gpu) <= 1e-4
    assert difference(on_cpu, on_gpu, "grad_norm") <= 1e-3


def test_the_memory_of_the_gpu_is_measured(on_gpu):
    """Tensors and cuBLAS's workspace: less than half a GB, which any process with CUDA exceeds."""
    assert all(0 < row["peak_memory_bytes"] < 5 * 10**8 for row in rows(on_gpu, "train"))


@pytest.mark.parametrize("strategy", ["single", "zero0"])
def test_fp16(on_cpu, data, tmp_path, strategy):
    settings: dict[str, Any] = {"deepspeed_config": zero_json(strategy)} if strategy != "single" else {}
    train(tmp_path, data, env=NOT_FORKED, dtype="float16", **CUDA, **settings)
    assert all(map(math.isfinite, losses(tmp_path).values())) and difference(on_cpu, tmp_path) <= 0.05


def test_zero2_on_a_named_device(on_cpu, data, tmp_path):
    train(tmp_path, data, env=NOT_FORKED, dtype="float32", deepspeed_config=zero_json("zero2"), **CUDA)
    assert difference(on_cpu, tmp_path) <= 1e-4


def test_sampling(on_gpu):
    done = run("sample.py", out_dir=on_gpu, num_samples=2, max_new_tokens=20, device="cuda")
    assert done.returncode == 0 and done.stdout.count("---------------") == 2, done.stderr


ALLOCATE = """
import torch
from training import distributed
with distributed.start("cuda", "auto"):
    torch.zeros(1, device="cuda")
    print(torch.cuda.memory._snapshot()["allocator_settings"]["expandable_segments"])
"""


def test_memory_segments_are_expandable():
    """Torch reads the environment at its first allocation, not when it is imported."""
    line = [sys.executable, "-c", ALLOCATE]
    environment = {name: value for name, value in os.environ.items() if "ALLOC_CONF" not in name}
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout == "True\n", done.stderr


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero2", "zero3"])
def test_compiled_and_eager_learn_alike(data, tmp_path, strategy):
    zero = strategy.startswith("zero")
    settings: dict[str, Any] = {"deepspeed_config": zero_json(strategy)} if zero else {"strategy": strategy}
    for compiled in (False, True):
        out = tmp_path / str(compiled)
        train(out, data, env=NOT_FORKED, dtype="bfloat16", **{**CUDA, "compile": compiled}, **settings)
    assert difference(tmp_path / "False", tmp_path / "True") <= 0.05
