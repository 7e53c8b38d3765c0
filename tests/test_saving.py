"""Checkpoints that are written in the background: the same ones, and what became of one that could not be."""

import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import metadata
from tests.running import TINY, command, difference, message, rows, run, start_process, train, wait_for_step, zero_json
from training import model_state
from training.checkpoint import Checkpoints, Saver, find_corruption, find_damage, read_metadata
from training.errors import CheckpointError
from training.model_state import open_state

SETTINGS: dict[str, Any] = {"gradient_accumulation_steps": 2, "max_iters": 6, "eval_interval": 2, "ranks": 2}
SETTINGS |= {"keep_checkpoints": 9}
STRATEGIES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp": {"strategy": "fsdp"},
    "zero3_nvme": {"deepspeed_config": zero_json("zero3_nvme")},
}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_they_hold_what_others_hold(tmp_path, data, strategy):
    """The state of their step, although training went on while they were written; and the run goes on from them."""
    own = SETTINGS | STRATEGIES[strategy] | ({"nvme_path": tmp_path} if "nvme" in strategy else {})
    later, now = tmp_path / "later", tmp_path / "now"
    train(later, data, **own, async_save=True)
    train(later, data, **{**own, "max_iters": 8}, async_save=True, init_from="resume")
    train(now, data, **{**own, "max_iters": 8})
    # DeepSpeedCPUAdam multiplies beta ** step on, step by step; where it begins at another step, it takes a power.
    exact = "nvme" not in strategy
    assert difference(later, now) <= (0 if exact else 1e-6)
    assert [row["step"] for row in rows(later, "save")] == [row["step"] for row in rows(now, "save")] == [2, 4, 6, 8]
    both = list(zip(Checkpoints(str(later)).intact(), Checkpoints(str(now)).intact(), strict=True))
    assert len(both) == 4
    for one, other in both if exact else both[:3]:
        assert one.name == other.name and find_corruption(one) is None
        saved, expected = (open_state(path, read_metadata(path)) for path in (one, other))
        for name, kind in expected.pieces:
            assert torch.equal(saved.whole(name, kind), expected.whole(name, kind)), f"{one.name}: {kind} of {name}"


def test_a_copy_is_written_not_what_became_of_it(tmp_path):
    weights = torch.zeros(2**22)
    saver = Saver(Checkpoints(str(tmp_path)), background=True)
    for step in (1, 2, 3):
        with saver.writing(metadata(step=step), best=False) as writing:
            writing.write("model.pt", {"weights": weights, "tied": weights})
        weights += 1
    saver.wait(last=True)
    for step, path in enumerate(Checkpoints(str(tmp_path)).intact(), 2):
        found = model_state.read_torch_file(path / "model.pt")
        assert torch.equal(found["weights"], torch.full((2**22,), step - 1.0))
        assert found["tied"].data_ptr() == found["weights"].data_ptr()  # written once


@pytest.fixture
def small_disk(tmp_path):
    """Of the checkpoints of a run, in tmp_path."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("ranks", [0, 2])
def test_one_that_failed_is_told_and_the_one_before_kept(small_disk, data, ranks):
    settings = {**TINY, **SETTINGS, "ranks": ranks, "out_dir": small_disk.parent, "dataset": data, "async_save": True}
    done = run("train.py", **settings)
    told = [line for line in done.stderr.splitlines() if "training continues, the next save tries again" in line]
    whole = Checkpoints(str(small_disk.parent)).intact()
    kept = f"(--init_from=resume continues from {whole[-1]})"
    assert told and all("No space left on device" in line and kept in line for line in told)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: cannot save step_000006: ")
    assert max(row["step"] for row in rows(small_disk.parent, "train")) == 5, "training did not go on"
    assert {path.name for path in small_disk.iterdir()} == {path.name for path in whole}


def test_a_failure_of_the_last_one_is_the_runs(tmp_path):
    saver = Saver(Checkpoints(str(tmp_path / "out")), background=True)
    with saver.writing(metadata(step=1), best=False) as writing:
        writing.write("", {})  # a folder
    with pytest.raises(CheckpointError, match=r"cannot save step_000001: .*no earlier checkpoint exists"):
        saver.wait(last=True)


def test_a_rank_that_is_killed_while_others_write_ends_the_run(tmp_path, data):
    """The thread of the other one waits for it: it must not keep its process."""
    settings = {**TINY, **SETTINGS, "out_dir": tmp_path, "dataset": data, "async_save": True, "max_iters": 10**6}
    with start_process(command("train.py", **settings), stdout=-1, stderr=-1, text=True) as process:
        wait_for_step(tmp_path, process, 20)
        (victim,) = [pid for pid in ranks_of(process.pid) if "RANK=1" in environment(pid)]
        subprocess.run(["kill", "-KILL", victim], check=True)
        since = time.monotonic()
        process.communicate(timeout=30)
    assert process.returncode == 137 and time.monotonic() - since < 20
    assert Checkpoints(str(tmp_path)).intact()


def ranks_of(launcher: int) -> list[str]:
    return Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()


def environment(pid: str) -> list[str]:
    return Path(f"/proc/{pid}/environ").read_text().split("\0")


def test_a_name_that_is_none(data):
    done = run("train.py", dataset=data, async_save="later")
    assert "async_save = 'later' (command line): must be True or False" in message(done)


def test_what_a_killed_save_left_is_no_part_of_the_next(tmp_path):
    """It was killed between its last file and the name that makes it count."""
    left = tmp_path / "checkpoints" / "unfinished_step_000003"
    left.mkdir(parents=True)
    for name in ("checkpoint.json", "of_a_rank_that_is_no_more.pt"):
        (left / name).write_text("{}")
    checkpoints = Checkpoints(str(tmp_path))
    with Saver(checkpoints).writing(metadata(step=3), best=True) as files:
        files.write("model.pt", {})
    path, about = checkpoints.newest()
    assert find_damage(path) is None and list(about["files"]) == ["model.pt"]
