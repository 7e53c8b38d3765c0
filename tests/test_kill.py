"""A run that is killed again and again, at random moments and during saves."""

import random
import subprocess
import time
from pathlib import Path
from typing import Any

from tests.running import TINY, command, difference, losses, start_process, train
from training.checkpoint import Checkpoints, find_damage

KILLS = 12
SETTINGS: dict[str, Any] = {"n_layer": 4, "n_embd": 96, "eval_interval": 3, "eval_iters": 1, "lr_decay_iters": 500}


def test_a_run_killed_a_dozen_times_loses_no_checkpoint(tmp_path, data):
    folder, chance = tmp_path / "killed", random.Random(0)
    saved = while_saving = 0
    for kill in range(KILLS):
        size = file_size(folder / "metrics.jsonl")
        settings = {**TINY, **SETTINGS, "dataset": data, "out_dir": folder, "max_iters": 100_000}
        settings["init_from"] = "resume" if saved else "scratch"
        settings["async_save"] = bool(kill // 2 % 2)  # and is killed while a thread writes
        line, is_new = command("train.py", **settings), kill < 4
        process = start_process(line, is_new, stdout=subprocess.DEVNULL)
        wait_for(process, lambda size=size: file_size(folder / "metrics.jsonl") not in (0, size))
        if kill == 0:  # on a busy machine the others might all come before the first checkpoint
            wait_for(process, Checkpoints(str(folder)).finished)
        if kill % 2:
            wait_for(process, lambda: unfinished(folder))
            time.sleep(chance.uniform(0, 0.005))
        else:
            time.sleep(chance.uniform(0, 0.3))
        process.kill()
        process.wait()
        while_saving += bool(unfinished(folder))
        saved = check(folder, saved)
    assert while_saving >= KILLS // 6, f"only {while_saving} kills hit a checkpoint that was being written"

    train(folder, data, **SETTINGS, init_from="resume", max_iters=saved + 5)
    train(tmp_path / "whole", data, **SETTINGS, max_iters=saved + 5)
    assert len(losses(folder)) == saved + 5
    assert difference(folder, tmp_path / "whole") == 0


def check(folder: Path, saved: int) -> int:
    """The newest checkpoint's step: whole, and not before the one that was saved at the last look."""
    checkpoints = Checkpoints(str(folder))
    if not checkpoints.finished():
        assert saved == 0, "the checkpoints are gone"
        return 0
    for path in checkpoints.finished():
        assert find_damage(path) is None
    path, about = checkpoints.newest()
    latest = folder / "latest"
    assert latest.exists() or len(checkpoints.finished()) == 1
    assert about["step"] >= saved
    return about["step"]


def unfinished(folder: Path) -> list[Path]:
    return list((folder / "checkpoints").glob("unfinished_*"))


def file_size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def wait_for(process: subprocess.Popen, condition) -> None:
    while not condition():
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.001)
