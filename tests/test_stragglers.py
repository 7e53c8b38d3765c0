"""A rank that keeps the others waiting, and one whose memory is full: both are named."""

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model import GPTConfig
from tests.running import TINY, command, message, rows, run, start_process, started_with, wait_for_step, zero_json
from training.config import PlainTrainConfig, TrainConfig, parse
from training.distributed import SINGLE_PROCESS, Layout
from training.errors import RankError
from training.run_folder import explain_out_of_memory
from training.strategies import gigabytes, model_state_bytes, out_of_memory_advice


def test_a_slow_rank_is_named_with_its_host(tmp_path, data):
    often = tmp_path / "often.py"  # five measurements take 2 s, not 20
    often.write_text("from training import stragglers as _stragglers\n_stragglers.PROBE_SHARE *= 10\n")
    settings = {**TINY, "dataset": data, "out_dir": tmp_path, "gradient_accumulation_steps": 2, "log_interval": 1}
    line = command("train.py", str(often), ranks=2, **settings | {"max_iters": 100_000, "eval_interval": 100_000})
    expected = f"rank 1 on {os.uname().nodename} slows down all ranks: its matmul takes"
    log = tmp_path / "log"
    with log.open("w") as file:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MARK": str(tmp_path)}
        process = start_process(line, env=environment, stdout=file, stderr=subprocess.STDOUT)
    wait_for_step(tmp_path, process, 8)
    environments = {int(pid): Path(f"/proc/{pid}/environ").read_bytes() for pid in started_with(f"MARK={tmp_path}")}
    (slow,) = [pid for pid, environment in environments.items() if b"\0RANK=1\0" in environment]
    until = time.monotonic() + 90
    while expected not in log.read_text() and time.monotonic() < until:
        for _ in range(30):  # the rank keeps a sixth of its time
            os.kill(slow, signal.SIGSTOP)
            time.sleep(0.025)
            os.kill(slow, signal.SIGCONT)
            time.sleep(0.005)
    process.terminate()
    process.wait(timeout=60)
    assert expected in log.read_text()
    probes = rows(tmp_path, "ranks")
    assert len(probes) >= 5 and all(len(row["matmul_ms"]) == 2 for row in probes)


@pytest.mark.skipif(sys.platform != "linux", reason="its limit on memory is Linux'")
@pytest.mark.parametrize("strategy, batch_size", [("ddp", 100_000), ("zero2", 100_000), ("ddp", 2**31 - 2)])
def test_full_memory_says_what_takes_it_and_what_to_try(tmp_path, data, strategy, batch_size):
    """torch runs out of memory at 100,000 sequences, and NumPy at two billion."""
    settings = {**TINY, "dataset": data, "out_dir": tmp_path, "batch_size": batch_size}
    settings |= {"gradient_accumulation_steps": 2}
    settings |= {"deepspeed_config": zero_json(strategy)} if strategy != "ddp" else {}
    script = "train_deepspeed.py" if strategy != "ddp" else "train.py"
    limit = tmp_path / "limit.py"  # of the rank's memory: a config file is Python
    limit.write_text("import resource as _resource\n_resource.setrlimit(_resource.RLIMIT_AS, (3 * 2**30, 3 * 2**30))\n")
    done = run(script, str(limit), ranks=2, **settings)
    told = message(done)
    assert "allocate" in told
    assert re.search(rf"the model state per rank under {strategy} is 0\.000[1-9] GB: parameters 0\.000\d GB", told)
    smaller = f"--batch_size={batch_size // 2} --gradient_accumulation_steps=4"
    assert f"\n    {smaller}\n    --activation_checkpointing=True\n" in told
    assert "./launch_deepspeed_zero3.sh: " in told and "zero3_offload" not in told, "the CPU is the device"


def test_full_memory_of_cublas_is_full_memory(tmp_path):
    """Its error is another class and text than torch's own."""
    cfg = parse(PlainTrainConfig, [f"--out_dir={tmp_path}"], "")
    with (
        pytest.raises(RankError, match="try, in this order"),
        explain_out_of_memory(cfg, SINGLE_PROCESS, GPTConfig(), "single", torch.float32),
    ):
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


def test_full_memory_of_a_part_of_the_model():
    """Two stages of two tensor-parallel ranks: a quarter of the parameters, and ZeRO-1 over the two that have it."""
    ranks = replace(SINGLE_PROCESS, world_size=8, layout=Layout(tensor=2, pipeline=2))
    cfg, model = parse(TrainConfig, ["--gradient_accumulation_steps=8"], ""), GPTConfig()
    quarter = model.parameter_count() / 4
    told = out_of_memory_advice(cfg, ranks, model, "zero1", torch.bfloat16, "full")
    state = f"{gigabytes(quarter * (2 + 6 + 12 / 2))}: parameters {gigabytes(2 * quarter)}, "
    assert f"the model state per rank under zero1 is {state}gradients {gigabytes(6 * quarter)}" in told


def test_the_model_state_by_the_zero_papers_formula():
    """Figure 1 of arXiv:1910.02054: 7.5e9 parameters on 64 ranks, 120, 31.4, 16.6 and 1.9 GB."""
    found = [
        model_state_bytes(f"zero{n}", 64, 7_500_000_000, torch.bfloat16, fp32_accumulation=False).total() / 1e9
        for n in range(4)
    ]
    assert [round(gb, 1) for gb in found] == [120.0, 31.4, 16.6, 1.9]
