"""Runs of train.py: the same loss on any number of ranks, exact resume, and what a run folder holds."""

import json
import math
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.running import ROOT, TINY, command, difference, losses, message, rows, run, start_process, train, zero_json
from training.checkpoint import Checkpoints


def test_two_ranks_train_as_one(tmp_path, data):
    settings: dict[str, Any] = {"gradient_accumulation_steps": 4, "dropout": 0.1}
    train(tmp_path / "one", data, **settings)
    train(tmp_path / "two", data, ranks=2, **settings)
    assert len(losses(tmp_path / "one")) == 30
    assert difference(tmp_path / "one", tmp_path / "two") <= 1e-5
    one, two = (rows(tmp_path / name, "eval") for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        assert a["step"] == b["step"]
        assert math.isclose(a["val_loss"], b["val_loss"], abs_tol=1e-5)


@pytest.fixture(scope="module")
def killed(tmp_path_factory, data):
    """A whole run, and the folder of one that kill -9 ended between two checkpoints."""
    whole, killed = tmp_path_factory.mktemp("runs") / "whole", tmp_path_factory.mktemp("runs") / "killed"
    settings: dict[str, Any] = {"max_iters": 200, "lr_decay_iters": 200, "eval_interval": 20, "dropout": 0.1}
    settings |= {"gradient_accumulation_steps": 2}
    train(whole, data, **settings)
    tiny = {**TINY, **settings, "dataset": data, "out_dir": killed}
    process = start_process(command("train.py", **tiny), stdout=subprocess.DEVNULL)
    while not (killed / "metrics.jsonl").exists() or len(rows(killed, "train")) < 50:
        time.sleep(0.005)
        assert process.poll() is None, "it ended before it could be killed"
    process.kill()
    assert process.wait() == -signal.SIGKILL
    return whole, killed, settings


@pytest.mark.parametrize("ranks, tolerance", [(0, 0.0), (2, 1e-5)])
def test_a_killed_run_goes_on_as_if_nothing_had_been(tmp_path, data, killed, ranks, tolerance):
    whole, folder, settings = killed
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", folder, copy], check=True)
    step = Checkpoints(str(copy)).newest()[1]["step"]
    assert 0 < step < 200
    output = train(copy, data, ranks=ranks, init_from="resume", **settings)
    assert f"resuming {copy}/checkpoints/step_{step:06d}" in output
    assert difference(whole, copy) <= tolerance
    assert [r["step"] for r in rows(copy, "eval")] == [r["step"] for r in rows(whole, "eval")]


def improvements(out_dir: Path) -> list[int]:
    """The steps whose validation loss was the best so far; the untrained model's counts, but is not saved."""
    first, *others = rows(out_dir, "eval")
    best, steps = first["val_loss"], []
    for row in others:
        if row["val_loss"] < best:
            best = row["val_loss"]
            steps.append(row["step"])
    return steps


def test_the_run_folder_tells_the_run(tmp_path, data):
    train(tmp_path, data, max_iters=12, eval_interval=4, keep_checkpoints=1, decay_lr=False, learning_rate=0.1)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["max_iters"], config["keep_checkpoints"], config["beta2"]) == (12, 1, 0.95)
    assert {"torch", "git_commit", "device"} <= json.loads((tmp_path / "environment.json").read_text()).keys()
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "latest").read_text() == "step_000012\n"
    saved = improvements(tmp_path)
    assert saved, "the loss never fell: this shows nothing"
    best = saved[-1]
    assert (tmp_path / "best").read_text() == f"step_{best:06d}\n"
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"step_000012", f"step_{best:06d}"}

    first, *_, last = rows(tmp_path, "train")
    assert (first["step"], last["step"]) == (0, 11)
    assert first["step_ms"] is None, "warm-up is not timed"
    assert last["step_ms"] > 0 and last["mfu"] is None and last["peak_memory_bytes"] > 10**8
    assert math.isclose(last["tokens_per_second"], 4 * 32 / last["step_ms"] * 1e3, rel_tol=1e-6)


def test_only_the_best_is_saved_where_that_is_wanted(tmp_path, data):
    """With a learning rate at which the loss falls, and then goes up and down."""
    settings: dict[str, Any] = {
        "always_save_checkpoint": False,
        "keep_checkpoints": 20,
        "decay_lr": False,
        "learning_rate": 0.1,
    }
    train(tmp_path, data, max_iters=60, eval_interval=4, **settings)
    steps = improvements(tmp_path)
    assert 0 < len(steps) < 15, "the loss fell all the time, or never: this shows nothing"
    saved = [path.name for path in Checkpoints(str(tmp_path)).finished()]
    assert saved == [f"step_{step:06d}" for step in steps]


def test_eval_only_evaluates_and_changes_nothing(tmp_path, data):
    train(tmp_path, data)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    last = rows(tmp_path, "eval")[-1]
    output = train(tmp_path, data, init_from="resume", eval_only=True)
    assert f"step 30/30 (100 %) train loss {last['train_loss']:.4f} val loss {last['val_loss']:.4f}" in output
    assert "step  0/30 (  0 %) train loss" in train(tmp_path, data, eval_only=True, wandb_log=True)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_run_that_starts_anew_keeps_the_one_before(tmp_path, data):
    train(tmp_path, data)
    metrics = (tmp_path / "metrics.jsonl").read_text()
    assert "moved the earlier run in" in train(tmp_path, data, max_iters=2)
    (previous,) = (tmp_path / "previous").iterdir()
    assert (previous / "metrics.jsonl").read_text() == metrics
    assert Checkpoints(str(previous)).newest()[1]["step"] == 30
    assert len(losses(tmp_path)) == 2


def test_a_run_says_how_far_it_is_and_how_to_go_on(tmp_path, data):
    output = train(tmp_path, data, max_iters=12, lr_decay_iters=12, log_interval=5, device="auto")
    row = rows(tmp_path, "train")[-1]
    speed = f"{row['step_ms']:>6,.1f} ms {row['tokens_per_second']:>6,.0f} tok/s ETA 0 s"
    assert (row["tokens"], row["progress"]) == (11 * 128, 11 / 12) and row["eta_seconds"] > 0
    evaluations = rows(tmp_path, "eval")
    best = f"{min(row['val_loss'] for row in evaluations):.4f}"
    start, cpu, first, step_0, _, step_10, last, end, sample, resume = output.splitlines()
    assert start.endswith("128 tokens per step = 1 rank x 1 micro-step x 4 sequences x 32 tokens")
    assert cpu.startswith("no GPU found") and "block_size" in cpu
    assert first.startswith(f"step  0/12 (  0 %) train loss {evaluations[0]['train_loss']:.4f} val loss ")
    no_speed = r"step  0/12 \(  0 %\)    128 tok loss \d\.\d{4} lr 1.7e-04 norm \d\.\d\d"
    assert re.fullmatch(no_speed, step_0), "warm-up"
    assert re.match(rf"step 10/12 \( 83 %\)   1\.4k tok loss {row['loss']:.4f} lr .* norm .*{speed}$", step_10)
    assert last.startswith("step 12/12 (100 %) train loss")
    assert re.match(rf"finished step 12 after \d+ s; best val loss {best}; everything is in {tmp_path}, ", end)
    assert sample == f"  sample:   python sample.py --out_dir={tmp_path}"
    assert resume == f"  continue: python train.py --init_from=resume --out_dir={tmp_path} --max_iters=24"
    again = run("train.py", init_from="resume", out_dir=tmp_path)
    assert f"the run was at step 12 already, and max_iters is 12; best val loss {best}" in again.stdout
    assert max(len(line) for line in output.splitlines() if line.startswith("step ")) <= 100


def test_a_folder_alone_resumes_its_run(tmp_path, data):
    """With the settings of the run, but for those that are given."""
    settings: dict[str, Any] = {"learning_rate": 3e-3, "dropout": 0.1, "keep_checkpoints": 5}
    train(tmp_path / "whole", data, max_iters=20, **settings)
    train(tmp_path / "parts", data, max_iters=10, **settings)
    done = run("train.py", init_from="resume", out_dir=tmp_path / "parts", max_iters=20)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    config = json.loads((tmp_path / "parts" / "config.json").read_text())
    assert config["keep_checkpoints"] == 5 and config["init_from"] == "resume"


def test_a_launch_script_resumes_a_folder_alone(tmp_path, data):
    """With the settings of the run in place of its default recipe, GPT-2 124M."""
    train(tmp_path / "whole", data, max_iters=20, gradient_accumulation_steps=2)
    train(tmp_path / "parts", data, max_iters=10, gradient_accumulation_steps=2)
    line = f"./launch_deepspeed_zero2.sh 2 --init_from=resume --out_dir={tmp_path / 'parts'} --max_iters=20"
    subprocess.run(line.split(), cwd=ROOT, check=True, timeout=300)
    assert len(losses(tmp_path / "parts")) == 20
    assert difference(tmp_path / "whole", tmp_path / "parts") <= 1e-5


def test_a_named_strategy_replaces_that_of_the_run(tmp_path, data):
    settings: dict[str, Any] = {"ranks": 2, "gradient_accumulation_steps": 2}
    train(tmp_path, data, max_iters=4, strategy="fsdp", reshard_after_forward=False, **settings)
    for arguments, name in (([], "fsdp"), (["--strategy=ddp"], "ddp")):
        done = run("train.py", *arguments, ranks=2, init_from="resume", out_dir=tmp_path, max_iters=6)
        assert done.returncode == 0, done.stderr
        assert Checkpoints(str(tmp_path)).newest()[1]["strategy"] == name
        shutil.rmtree(tmp_path / "checkpoints" / "step_000006")


def test_a_damaged_config_of_a_run_to_resume(tmp_path, data):
    train(tmp_path, data, max_iters=2)
    (tmp_path / "config.json").write_text("{")
    assert "config.json: is damaged; remove it" in message(run("train.py", init_from="resume", out_dir=tmp_path))


def test_a_machine_without_git_can_train(tmp_path, data):
    train(tmp_path, data, max_iters=1, env={"PATH": ""})
    assert json.loads((tmp_path / "environment.json").read_text())["git_commit"] is None


def test_other_ranks_are_quiet_and_plain_lines_have_no_control_characters(tmp_path, data):
    output = train(tmp_path, data, ranks=2, gradient_accumulation_steps=2, max_iters=4)
    assert output.count("step 3/4 ( 75 %)") == 1
    assert "\r" not in output and "\x1b" not in output


def test_wandb_offline_gets_the_metrics_and_keeps_its_run_when_resumed(tmp_path, data):
    env = {"WANDB_MODE": "offline", "WANDB_API_KEY": "0123456789" * 4}
    settings: dict[str, Any] = {"wandb_log": True, "wandb_project": "tests", "env": env}
    output = train(tmp_path, data, max_iters=6, **settings)
    assert f"W&B: offline; to upload: wandb sync {tmp_path}/wandb/offline-run-" in output
    train(tmp_path, data, max_iters=8, init_from="resume", **settings)
    logs = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    (identity,) = {path.stem.removeprefix("run-") for path in logs}
    assert (tmp_path / "wandb_id").read_text() == identity
    assert len(logs) == 2 and b"val/loss" in logs[0].read_bytes()
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or env["WANDB_API_KEY"].encode() not in path.read_bytes(), path


def test_tensorboard_gets_the_metrics_of_every_step_once(tmp_path, data):
    """A killed run's steps after its checkpoint are hidden when it is resumed."""
    settings: dict[str, Any] = {"tensorboard": True, "eval_interval": 4}
    output = train(tmp_path, data, max_iters=8, **settings)
    assert f"TensorBoard: tensorboard --logdir={tmp_path}/tensorboard" in output
    shutil.rmtree(tmp_path / "checkpoints" / "step_000008")
    train(tmp_path, data, max_iters=10, init_from="resume", **settings)
    logged = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for name in ("loss", "lr", "grad_norm", "tokens"):
        found = {event.step: event.value for event in logged.Scalars(name)}
        assert found == pytest.approx(losses(tmp_path, name)) and len(found) == 10, name
    assert [event.step for event in logged.Scalars("val/loss")] == [0, 4, 8, 10]


def test_bf16_and_fp32_learn_alike(tmp_path, data):
    final = {}
    for dtype in ("float32", "bfloat16"):
        train(tmp_path / dtype, data, dtype=dtype)
        final[dtype] = rows(tmp_path / dtype, "eval")[-1]["val_loss"]
    # bf16 has 8 bits of mantissa: a hundredth of the loss is what 30 steps of it may cost
    assert math.isclose(*final.values(), rel_tol=1e-2)
    assert final["float32"] != final["bfloat16"]


@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp", "zero0", "zero2"])
def test_compile_trains_the_same(tmp_path, data: Path, reference, strategy):
    """On one rank, each is what it is on several; a graph break would be an error. ZeRO-3: test_zero_runs.py."""
    settings: dict[str, Any] = {"max_iters": 4, "n_layer": 1}
    eager = reference(**settings)
    if strategy.startswith("zero"):
        settings["deepspeed_config"] = zero_json(strategy)
    elif strategy != "single":
        settings["strategy"] = strategy
    train(tmp_path / "compiled", data, compile=True, **settings)
    assert Checkpoints(str(tmp_path / "compiled")).newest()[1]["strategy"] == strategy
    assert difference(eager, tmp_path / "compiled") <= 1e-5
