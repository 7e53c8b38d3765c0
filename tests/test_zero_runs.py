"""Runs of train_deepspeed.py: launchers, schedulers, optimizers, its log, and errors of a resume."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.serialization import safe_globals

from launch.ranks import free_port
from tests.running import (
    ROOT,
    TINY,
    difference,
    losses,
    message,
    refused,
    rows,
    run,
    started_with,
    train,
    zero_json,
)
from tests.test_changes import LION
from training.checkpoint import Checkpoints
from training.deepspeed_layout import STAND_INS, StandIn
from training.model_state import read_torch_file

SHORT: dict[str, Any] = {"max_iters": 6, "lr_decay_iters": 6, "warmup_iters": 2, "gradient_accumulation_steps": 4}
SHORT["log_interval"] = 1


def variant(folder: Path, strategy: str, **blocks) -> Path:
    """A JSON of deepspeed_configs/ with blocks added; None removes one."""
    config = json.loads((ROOT / zero_json(strategy)).read_text()) | blocks
    path = folder / f"{strategy}.json"
    path.write_text(json.dumps({name: block for name, block in config.items() if block is not None}))
    return path


@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_one_process_needs_no_launcher(tmp_path, data, strategy):
    train(tmp_path / "one", data, **SHORT)
    train(tmp_path / "zero", data, deepspeed_config=zero_json(strategy), **SHORT)
    assert difference(tmp_path / "one", tmp_path / "zero") <= 1e-5


@pytest.mark.parametrize(
    "launcher",
    [["deepspeed.launcher.runner", "--num_gpus=2"], ["torch.distributed.run", "--standalone", "--nproc_per_node=2"]],
    ids=lambda words: words[0].split(".")[0],
)
def test_other_launchers_train_the_same(tmp_path, data, launcher):
    """deepspeed puts --local_rank before the arguments; its users write --deepspeed_config FILE."""
    tiny = [f"--{k}={v}" for k, v in {**TINY, **SHORT, "dataset": data, "out_dir": tmp_path / "zero"}.items()]
    words = [
        "train_deepspeed.py",
        "config/train_gpt2_deepspeed_zero3.py",
        "--deepspeed_config",
        zero_json("zero1"),
        *tiny,
    ]
    port = [f"--master_port={free_port()}"] if "deepspeed.launcher.runner" in launcher else []  # else always the same
    done = run("-m", *launcher, *port, *words)
    assert done.returncode == 0, done.stderr
    assert "zero1: AdamW of torch" in done.stdout
    train(tmp_path / "one", data, **{**SHORT, "weight_decay": 0.1})
    assert difference(tmp_path / "one", tmp_path / "zero") <= 1e-5


def test_a_scheduler_of_deepspeed_sets_the_learning_rate(tmp_path, data):
    names = ("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps")
    block = {"type": "WarmupDecayLR", "params": {"warmup_type": "linear", **dict.fromkeys(names, "auto")}}
    settings = {**SHORT, "max_iters": 12, "warmup_iters": 4, "eval_interval": 6}
    path = variant(tmp_path, "zero2", scheduler=block)
    output = train(tmp_path / "out", data, ranks=2, deepspeed_config=path, **settings)
    assert "zero2: AdamW of torch, WarmupDecayLR" in output
    rates = list(losses(tmp_path / "out", "lr").values())
    assert max(rates) == pytest.approx(1e-3) and rates[1] < rates[3] and rates[6] > rates[8] > rates[11] > 0
    given = json.loads((tmp_path / "out" / "deepspeed.json").read_text())["scheduler"]["params"]
    assert (given["warmup_num_steps"], given["total_num_steps"]) == (4, 12)


def test_without_an_optimizer_block_training_optim_is_used(tmp_path, data):
    train(tmp_path / "one", data, **SHORT)
    for strategy in ("zero1", "zero2_offload"):
        path = variant(tmp_path, strategy, optimizer=None)
        output = train(tmp_path / strategy, data, ranks=2, deepspeed_config=path, **SHORT)
        assert f"{strategy}: AdamW of torch" in output
        assert difference(tmp_path / "one", tmp_path / strategy) <= 1e-5


SCRIPT = f"""
import importlib, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from training import distributed, optim
{LION}
optim.make_optimizer = lambda model, cfg: Lion(optim.parameter_groups(model, cfg), cfg.learning_rate)
distributed.run(importlib.import_module(sys.argv.pop(1).removesuffix(".py")).main)
"""


def test_another_optimizer_trains_and_resumes_under_every_stage(tmp_path, data):
    """Lion in training/optim.py, with the JSONs as they are; it has a single state, and no step count."""
    script = tmp_path / "lion.py"
    script.write_text(SCRIPT)
    settings: dict[str, Any] = {**TINY, **SHORT, "dataset": data, "learning_rate": 1e-4, "eval_interval": 3}

    def lion(name: str, out: Path, ranks: int = 0, **more) -> str:
        done = run(str(script), name, ranks=ranks, **{**settings, "out_dir": out, **more})
        assert done.returncode == 0, done.stderr
        return done.stdout

    lion("train.py", tmp_path / "one")
    for before, strategy in (("zero0", "zero1"), ("zero1", "zero3"), ("zero3_offload", "zero2_offload")):
        out = tmp_path / f"{before}-{strategy}"
        lion("train_deepspeed.py", out, ranks=2, deepspeed_config=zero_json(before), max_iters=3)
        output = lion("train_deepspeed.py", out, ranks=2, deepspeed_config=zero_json(strategy), init_from="resume")
        assert f"{strategy}: Lion of " in output
        assert difference(tmp_path / "one", out) <= 1e-5


@pytest.mark.parametrize("block", [{}, {"partition_activations": True, "cpu_checkpointing": True}], ids=str)
def test_deepspeeds_activation_checkpointing_changes_no_loss(tmp_path, data, block):
    settings = {**SHORT, "dropout": 0.1}
    train(tmp_path / "one", data, **settings)
    path = variant(tmp_path, "zero3", activation_checkpointing=block)
    settings |= {"activation_checkpointing": True, "deepspeed_config": path, "verbose": True}
    output = train(tmp_path / "zero", data, ranks=2, **settings)
    assert difference(tmp_path / "one", tmp_path / "zero") <= 1e-5
    assert "Activation Checkpointing Information" in output, "activation checkpointing did not run"


def test_compile_changes_no_loss(tmp_path, data):
    settings = {**SHORT, "n_layer": 1}  # each layer takes a core eight seconds to compile
    train(tmp_path / "one", data, **settings)
    train(tmp_path / "zero", data, ranks=2, deepspeed_config=zero_json("zero3"), **{**settings, "compile": True})
    assert difference(tmp_path / "one", tmp_path / "zero") <= 1e-5


def test_breakdowns_and_profiles_go_to_the_log(tmp_path, data):
    blocks = {
        **{"wall_clock_breakdown": True, "memory_breakdown": True, "comms_logger": {"enabled": True}},
        "flops_profiler": {"enabled": True, "profile_step": 3, "detailed": False},
    }
    path = variant(tmp_path, "zero2", **blocks)
    output = train(tmp_path / "out", data, ranks=2, deepspeed_config=path, **SHORT)
    ours = ("zero2: ", "33,984 parameters ", "step ", "finished ", "  sample: ", "  continue: ")
    assert all(line.startswith(ours) for line in output.splitlines()), output
    log = (tmp_path / "out" / "deepspeed.log").read_text()
    for part in ("fwd_microstep", "CPU Virtual Memory", "Flops Profiler", "all_reduce"):
        assert part in log, part


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data) -> Path:
    out = tmp_path_factory.mktemp("runs") / "out"
    train(out, data, ranks=2, deepspeed_config=zero_json("zero2"), **{**SHORT, "eval_interval": 3})
    return out


def test_deepspeed_leaves_no_scripts_beside_the_checkpoints(trained):
    assert {path.name for path in (trained / "checkpoints").iterdir()} == {"step_000003", "step_000006"}


def resume(trained: Path, data: Path, ranks: int, **settings) -> str:
    """The message of a resume that fails; no rank is left."""
    mark = f"MARK={trained}-{len(settings)}"
    given = {**SHORT, "init_from": "resume", **settings}
    told = refused(trained, data, ranks, dict([mark.split("=")]), **given)
    assert not started_with(mark)
    return told


def test_a_damaged_file_is_named_and_the_previous_checkpoint_offered(trained, data, tmp_path):
    copy = tmp_path / "out"
    subprocess.run(["cp", "-r", trained, copy], check=True)
    shard = copy / "checkpoints" / "step_000006" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:1000])
    told = resume(copy, data, 2, deepspeed_config=zero_json("zero2"))
    assert f"{shard.name} has 1,000 of {size:,} bytes; remove that folder to resume from the one before" in told
    shard.unlink()
    assert f"{shard.name} is missing" in resume(copy, data, 2, deepspeed_config=zero_json("zero2"))


def test_a_full_disk_ends_all_ranks_and_keeps_earlier_checkpoints(data, tmp_path):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=900k", "tmpfs", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small disk can be mounted by root only")
    try:
        settings = {**TINY, **SHORT, "dataset": data, "out_dir": tmp_path / "out", "eval_interval": 2}
        settings |= {"deepspeed_config": zero_json("zero2"), "keep_checkpoints": 5, "max_iters": 40}
        told = message(run("train_deepspeed.py", ranks=2, **settings))
        assert "cannot save step_" in told and "No space left on device" in told
        newest = Checkpoints(str(tmp_path / "out")).newest()[0]
        assert f"--init_from=resume continues from {newest}" in told
        assert rows(tmp_path / "out", "train")
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_a_member_of_an_enum_is_read_as_every_python_stores_it(tmp_path):
    """Python 3.11.0 to 3.11.3, which Debian 12 has, stores it as a call of getattr. None is made when it is read."""
    from deepspeed.runtime.zero.config import ZeroStageEnum

    class Stored:
        def __reduce__(self):
            return getattr, (ZeroStageEnum, "weights")

    for name, member in (("old", Stored()), ("new", ZeroStageEnum.weights)):
        torch.save({"zero_stage": member, "step": 3}, tmp_path / name)
        with safe_globals(STAND_INS):
            content = read_torch_file(tmp_path / name)
        assert content["step"] == 3 and type(content["zero_stage"]) is StandIn
