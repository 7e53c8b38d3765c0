"""Runs that are asked to stop or to save, or that cannot continue: all ranks act together, and nothing is lost."""

import os
import random
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.running import (
    TINY,
    command,
    difference,
    losses,
    refused,
    rows,
    run,
    start_process,
    started_with,
    train,
    wait_for_step,
    zero_json,
)
from training.checkpoint import Checkpoints
from training.errors import HUNG, STOPPED

SETTINGS: dict[str, Any] = {"n_layer": 4, "n_embd": 96, "eval_interval": 3, "eval_iters": 8, "lr_decay_iters": 500}
SETTINGS |= {"gradient_accumulation_steps": 2, "resume": "auto"}
SCRIPTS: dict[str, dict[str, Any]] = {"train.py": {}, "train_deepspeed.py": {"deepspeed_config": zero_json("zero2")}}
both_scripts = pytest.mark.parametrize("script", SCRIPTS)


def start(script: str, data: Path, folder: Path, mark: str = "", fresh: bool = False, **settings) -> subprocess.Popen:
    """A run on 2 ranks; fresh: not forked (see tests/fork_server.py)."""
    given = {**TINY, **SETTINGS, **SCRIPTS[script], "dataset": data, "out_dir": folder, **settings}
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MARK": mark}
    pipe = subprocess.PIPE
    line = command(script, ranks=2, **given)
    return start_process(line, fresh, env=env, stdout=pipe, stderr=subprocess.STDOUT, text=True)


WAYS = {"train.py": ["SIGTERM", "max_minutes", "stop", "SIGINT", "SIGUSR1"], "train_deepspeed.py": ["SIGTERM", "stop"]}


@both_scripts
def test_a_run_stopped_again_and_again_loses_no_step(tmp_path, data, script):
    folder, chance, saved = tmp_path / "stopped", random.Random(0), 0
    for how in WAYS[script]:  # few for DeepSpeed: the loop that reads the requests is the same
        deadline: dict[str, Any] = {"max_minutes": 0.05} if how == "max_minutes" else {}
        process = start(script, data, folder, fresh=not saved, max_iters=100_000, **deadline)
        wait_for_step(folder, process, saved)
        time.sleep(chance.uniform(0, 0.4))
        if how == "stop":
            (folder / "stop").touch()
        elif how != "max_minutes":
            process.send_signal(getattr(signal, how))
        output, _ = process.communicate(timeout=60)
        assert process.returncode == STOPPED, output
        _, about = Checkpoints(str(folder)).newest()
        why = f"the file {folder}/stop" if how == "stop" else "max_minutes = 0.05" if deadline else how
        assert f"stopped by {why}: saved at step {about['step']}; --resume=auto continues from there" in output
        assert about["step"] == max(losses(folder)) + 1 > saved, "a step was lost, or no step was made"
        assert not (folder / "stop").exists()
        saved = about["step"]
    resume = {**SETTINGS, **SCRIPTS[script], "max_iters": saved + 5}
    train(folder, data, ranks=2, **resume)
    train(tmp_path / "whole", data, ranks=2, **resume)
    assert len(losses(folder)) == saved + 5 and difference(folder, tmp_path / "whole") <= 1e-6
    evaluated = [{row["step"]: row["val_loss"] for row in rows(f, "eval")} for f in (folder, tmp_path / "whole")]
    assert evaluated[0].keys() == evaluated[1].keys()
    assert max(abs(evaluated[0][step] - loss) for step, loss in evaluated[1].items()) <= 1e-6


@both_scripts
def test_a_stop_signal_during_startup_is_obeyed(tmp_path, data, script):
    mark = f"start-{tmp_path}"
    process = start(script, data, tmp_path, mark, fresh=True, max_iters=100_000)
    while len(started_with(mark)) < 3:  # the launcher and 2 ranks, which do not handle signals yet
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == STOPPED and "stopped by SIGUSR1: nothing to save" in output, output


def test_a_stop_in_the_first_evaluation_has_nothing_to_save(tmp_path, data):
    process = start("train.py", data, tmp_path / "out", eval_iters=100_000)
    while not (tmp_path / "out" / "environment.json").exists():
        time.sleep(0.01)
    time.sleep(2)
    (tmp_path / "out" / "stop").touch()
    output, _ = process.communicate(timeout=30)
    assert process.returncode == STOPPED and "stop: nothing to save" in output, output


@both_scripts
def test_a_requested_save_is_made_and_the_run_continues(tmp_path, data, script):
    folder = tmp_path / "out"
    process = start(script, data, folder, eval_interval=100_000, max_iters=100_000)
    wait_for_step(folder, process, 3)
    (folder / "save").touch()
    while (folder / "save").exists():
        assert process.poll() is None
        time.sleep(0.01)
    _, about = Checkpoints(str(folder)).newest()
    assert about["step"] > 3 and not about["evaluated"]
    wait_for_step(folder, process, about["step"] + 3)
    process.terminate()
    assert process.wait(30) == STOPPED


@both_scripts
def test_a_nan_loss_ends_the_run_and_is_not_saved(tmp_path, data, script):
    settings = {**SETTINGS, **SCRIPTS[script], "eval_interval": 50}
    train(tmp_path / "out", data, ranks=2, **settings, max_iters=4)
    path, about = Checkpoints(str(tmp_path / "out")).newest()
    error = refused(tmp_path / "out", data, ranks=2, **settings, max_iters=50, learning_rate=1e18)
    assert re.match(r"step [4-9]: loss .*(nan|inf) on rank \d, .*gradient norm ", error), error
    assert "stopped without saving this step" in error and about["step"] == 4
    assert Checkpoints(str(tmp_path / "out")).newest()[0] == path
    assert f"resume from {path} with --init_from=resume and a lower --learning_rate" in error


def test_a_stopped_rank_is_named_by_its_place_and_the_run_ends(tmp_path, data):
    """train.py's is in test_hosts.py."""
    folder, mark = tmp_path / "out", f"MARK={tmp_path}"
    layout: dict[str, Any] = {"tensor_parallel": 2, "max_iters": 100_000}
    process = start("train_deepspeed.py", data, folder, str(tmp_path), hang_minutes=0.1, **layout)
    wait_for_step(folder, process, 4)
    stopped = time.monotonic()
    (pid,) = [p for p in started_with(mark) if "RANK=1" in variables(p)]
    os.kill(int(pid), signal.SIGSTOP)
    output, _ = process.communicate(timeout=60)
    assert time.monotonic() - stopped < 60 and process.returncode == HUNG
    assert output.count("error: ") == 1 and "no progress for 6 s" in output, output
    expected = "no sign of life from rank 1 (tensor 1) (process, machine or network); rank 0 (tensor 0) waiting in "
    assert expected in output, output
    assert "Thread" in (folder / "hang" / "rank_00000.txt").read_text()
    assert not started_with(mark)


def variables(pid: str) -> list[str]:
    return Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")


def test_a_rank_stuck_in_python_is_named_with_its_line(tmp_path, data):
    folder = tmp_path / "out"
    process = start("train.py", data, folder, max_iters=100_000, eval_interval=100_000, hang_minutes=0.1)
    wait_for_step(folder, process, 4)
    os.mkfifo(folder / "pipe")  # without a reader: rank 0 blocks when it opens it
    (folder / "pipe").replace(folder / "metrics.jsonl")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == HUNG, output
    assert "rank 0 stuck in open (metrics.py:" in output and "; rank 1 waiting in " in output, output
    stacks = [(folder / "hang" / f"rank_0000{rank}.txt").read_text() for rank in range(2)]
    assert "metrics.py" in stacks[0] and re.search("in (act|gather|_engine_run_backward)", stacks[1]), stacks[1]


@both_scripts
def test_a_rank_that_dies_ends_the_others_and_is_named_first(tmp_path, data, script):
    folder, mark = tmp_path / "out", f"MARK={tmp_path}"
    process = start(script, data, folder, str(tmp_path), fresh=script == "train.py", max_iters=100_000)
    wait_for_step(folder, process, 4)
    killed = time.monotonic()
    (pid,) = [p for p in started_with(mark) if "RANK=1" in variables(p)]
    os.kill(int(pid), signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGKILL and time.monotonic() - killed < 30
    assert output.count("launch.ranks: rank 1 ended with signal 9 (SIGKILL)") == 1, output
    assert "Traceback" not in output
    assert not started_with(mark)


def test_max_minutes_must_not_be_negative():
    done = run("train.py", "--max_minutes=-1", "--resume=yes")
    assert done.returncode == 2 and "max_minutes = -1.0 (command line): must not be negative" in done.stderr
    assert "resume = 'yes' (command line): must be one of" in done.stderr
