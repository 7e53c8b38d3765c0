"""Nothing is lost, and nobody let in: ranks agree, checkpoints are checked, a folder has one run, ends hold."""

import faulthandler
import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launch.ranks import free_port
from tests.checkpoints import metadata, run_folder
from tests.running import (
    ROOT,
    TINY,
    command,
    losses,
    refused,
    rows,
    run,
    start_process,
    train,
    wait_for_step,
)
from training import figures, trackers
from training import run_folder as own_folder
from training.checkpoint import Checkpoints, Saver, find_damage, metadata_checksum, read_metadata
from training.config import PlainTrainConfig, TrainConfig, parse
from training.distributed import SINGLE_PROCESS
from training.errors import CheckpointError, ConfigError
from training.model_state import open_state
from training.run_control import Watchdog

STEPS = ("step_000003", "step_000004")


@pytest.fixture
def two(tmp_path) -> Checkpoints:
    """A run folder with two checkpoints."""
    model, _ = run_folder(tmp_path)
    files = read_metadata(tmp_path / "checkpoints" / STEPS[0])["files"]
    with Saver(Checkpoints(str(tmp_path))).writing(metadata(step=4), best=False) as writer:
        for name in files:
            writer.write(
                name, dict(model.named_parameters()) if name == "model.pt" else {"optimizer": {}, "scaler": {}}
            )
    return Checkpoints(str(tmp_path))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def rewrite(folder: Path, **changes: Any) -> None:
    """Change a checkpoint.json, with the right checksum of its own."""
    about = {key: value for key, value in {**read_metadata(folder), **changes}.items() if value != "missing"}
    about["own_crc32"] = metadata_checksum(about)
    (folder / "checkpoint.json").write_text(json.dumps(about))


DEEP = "[" * 10**5
DAMAGES: dict[str, Any] = {
    "model.pt does not match its checksum": lambda folder: flip(folder / "model.pt"),
    "model.pt has 10 of": lambda folder: os.truncate(folder / "model.pt", 10),
    "optimizer.pt is missing": lambda folder: (folder / "optimizer.pt").unlink(),
    "checkpoint.json has format 2, this code reads 1": lambda folder: rewrite(folder, format=2),
    "checkpoint.json cannot be read": lambda folder: (folder / "checkpoint.json").write_text('{"format": 1,'),
    "checkpoint.json cannot be read (RecursionError": lambda folder: (folder / "checkpoint.json").write_text(
        "[" * 10**5
    ),
    "checkpoint.json cannot be read (AttributeError": lambda folder: (folder / "checkpoint.json").write_text("[]"),
    "checkpoint.json does not match its own checksum": lambda folder: (folder / "checkpoint.json").write_text(
        (folder / "checkpoint.json").read_text().replace('"step": 4', '"step": 5')
    ),
    "checkpoint.json cannot be read (KeyError: 'model')": lambda folder: rewrite(folder, model="missing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_with_its_reason(two, damage, capsys):
    older, newer = (two.folder / name for name in STEPS)
    assert two.usable(fall_back=True) == (newer, read_metadata(newer))
    DAMAGES[damage](newer)
    with pytest.raises(CheckpointError, match=r"step_000004 is damaged: .*; remove that folder to resume"):
        two.newest()
    capsys.readouterr()
    assert two.usable(fall_back=True) == (older, read_metadata(older))
    assert capsys.readouterr().err.startswith(f"warning: {newer} is damaged: {damage}")
    flip(older / "optimizer.pt")
    before = sorted(two.out_dir.rglob("*"))
    with pytest.raises(CheckpointError, match="none of its 2 checkpoints can be used; restore one from a copy"):
        two.usable(fall_back=True)
    assert sorted(two.out_dir.rglob("*")) == before


def test_checkpoints_that_cannot_be_listed_are_no_new_run(tmp_path, data):
    (tmp_path / "checkpoints").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "metrics.jsonl").write_text("left\n")
    told = refused(tmp_path, data, resume="auto")
    assert told == f"{tmp_path}/checkpoints is a link to a folder that does not exist; mount it"
    assert (tmp_path / "metrics.jsonl").read_text() == "left\n"


def test_a_run_goes_on_before_a_flipped_bit_and_replaces_it(tmp_path, data, reference):
    """Rows of metrics.jsonl that are damaged are left out; folders that are not ours stay."""
    train(tmp_path, data, eval_interval=5, max_iters=15)
    checkpoints, metrics = tmp_path / "checkpoints", tmp_path / "metrics.jsonl"
    flip(checkpoints / "step_000015" / "model.pt")
    for name in ("mine", "step_000020.bak"):
        (checkpoints / name).mkdir()
    lines = metrics.read_text().splitlines(keepends=True)
    damaged = ['{"kind": "train", "st', "\0" * 50, "[1]", '{"step": 3}', '{"kind": "train", "step": 3}']
    metrics.write_text("".join([*lines[:4], *(f"{line}\n" for line in damaged), *lines[4:]]))
    settings = {**TINY, "dataset": data, "out_dir": tmp_path, "eval_interval": 5, "resume": "auto"}
    done = run("train.py", **settings)
    assert done.returncode == 0 and f"warning: {checkpoints}/step_000015 is damaged: model.pt does not" in done.stderr
    assert losses(tmp_path) == losses(reference(eval_interval=5)), "steps 10 to 29 were trained again"
    names = {path.name for path in checkpoints.iterdir()}
    assert names >= {"mine", "step_000020.bak", "step_000025", "step_000030"} and "step_000015" not in names
    text = metrics.read_text()
    metrics.write_text(text + "".join(damaged))
    with_damage = figures.read_run(tmp_path)
    metrics.write_text(text)
    assert figures.read_run(tmp_path) == with_damage


WRONG_CONTENT: dict[str, dict[str, Any]] = {
    "lists no *mp_rank_00_model_states.pt": {"strategy": "zero2"},
    "problems in its parameters: ": {"model": {**metadata()["model"], "n_layer": 3}},
    "its model cannot be built": {"model": {**metadata()["model"], "n_embd": -32}},
}


@pytest.mark.parametrize("words", WRONG_CONTENT)
def test_a_checkpoint_that_does_not_hold_what_it_says(two, words):
    folder = two.folder / STEPS[0]
    rewrite(folder, **WRONG_CONTENT[words])
    assert find_damage(folder) is None, "its own checksum and the sizes are right"
    with pytest.raises(CheckpointError, match=words.replace("*", r"\*")):
        open_state(folder, read_metadata(folder))


def test_only_the_files_that_a_checkpoint_lists_are_read(tmp_path, data):
    train(tmp_path, data, ranks=2, strategy="fsdp", gradient_accumulation_steps=2, max_iters=3)
    (folder,) = Checkpoints(str(tmp_path)).finished()
    before = open_state(folder, read_metadata(folder))
    (folder / "shard_0000a.pt").write_bytes(b"not listed")
    after = open_state(folder, read_metadata(folder))
    assert all(before.whole(name).equal(after.whole(name)) for name in before.shapes)


def two_nodes(tmp_path: Path, data: Path, *own: dict[str, Any]) -> list[str]:
    """A run of two nodes of one rank, each with a folder and settings of its own, that must be refused; its stderr."""
    shared = {**TINY, "dataset": data, "gradient_accumulation_steps": 2, "resume": "auto", "max_iters": 20}
    address = ["--nnodes=2", "--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    with ExitStack() as stack:
        nodes = []
        for number, settings in enumerate(own):
            line = command("train.py", **{**shared, "out_dir": tmp_path / str(number), **settings})
            line[1:1] = ["-m", "launch.ranks", f"--node_rank={number}", *address, "1"]
            nodes.append(stack.enter_context(start_process(line, stderr=subprocess.PIPE, text=True)))
        errors = [node.communicate(timeout=120)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [2, 2] and "Traceback" not in "".join(errors), errors
    return errors


def test_ranks_that_differ_do_not_train(tmp_path, data, make_data):
    """Two nodes with other copies of a checkpoint, other settings, or other data."""
    for number in (0, 1):
        run_folder(tmp_path / str(number))
    (tmp_path / "1" / "checkpoints" / STEPS[0] / "checkpoint.json").write_text("")
    host = socket.gethostname()
    told, _ = two_nodes(tmp_path, data, {}, {"out_dir": tmp_path / "1"})
    assert told.startswith("error: step_000003: checkpoint.json cannot be read") and f"on rank 1 ({host}), but" in told
    told, _ = two_nodes(tmp_path, data, {"resume": ""}, {"resume": "", "seed": 7, "dataset": make_data(range(250))})
    assert told == f"error: seed: 7 on rank 1 ({host}), but 1337 on rank 0 ({host}); make them the same\n"
    told, _ = two_nodes(tmp_path, data, {"resume": ""}, {"resume": "", "dataset": tmp_path / "made"})
    assert "train.bin: 500 bytes, CRC-32 of both ends" in told and "on rank 1" in told


def test_a_folder_has_one_run(tmp_path, data):
    train(tmp_path, data, max_iters=3)
    before = (tmp_path / "config.json").read_bytes()
    with own_folder.lock(tmp_path / "lock"):
        told = refused(tmp_path, data, resume="auto", max_iters=5)
        assert told.startswith(
            f"out_dir = '{tmp_path}': in use by process {os.getpid()} on {socket.gethostname()}; stop"
        )
        assert (tmp_path / "config.json").read_bytes() == before
    train(tmp_path, data, resume="auto", max_iters=5)


HANG = """
import sys, time
from pathlib import Path
from training.config import TrainConfig
from training.distributed import SINGLE_PROCESS
from training.run_control import Watchdog
Watchdog(TrainConfig(out_dir=sys.argv[1], hang_minutes=0.01), SINGLE_PROCESS)
time.sleep(100)
"""


def test_the_watchdog_ends_a_run_whose_stacks_cannot_be_written(tmp_path):
    (tmp_path / "hang").write_text("a file")
    done = subprocess.run([sys.executable, "-c", HANG, tmp_path], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 76 and "no progress for 1 s after the start; stacks cannot be written" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_watchdog_goes_by_the_clock_of_the_file_server(tmp_path, capsys):
    """Files of this hang are newer than those of an earlier one, whatever the host's clock says."""
    watchdog = Watchdog(TrainConfig(out_dir=str(tmp_path), hang_minutes=0.0), replace(SINGLE_PROCESS, world_size=3))
    watchdog.folder.mkdir()
    with watchdog.paths[0].open("w") as file:
        faulthandler.dump_traceback(file)
    for rank, age in enumerate((-100, -101, 500)):
        if rank:
            watchdog.paths[rank].write_text(watchdog.paths[0].read_text())
        os.utime(watchdog.paths[rank], (time.time() - age,) * 2)
    watchdog.report()
    assert "no sign of life from rank 2 " in capsys.readouterr().err


@pytest.mark.parametrize(
    "env, project, reason",
    [
        ({"WANDB_MODE": "online"}, "tests", "No API key configured"),
        ({"WANDB_MODE": "sometimes"}, "tests", "mode Input should be 'online', 'offline'"),
    ],
)
def test_wandb_is_checked_before_anything_is_written(tmp_path, data, env, project, reason):
    out = tmp_path / "out"
    env = {"HOME": str(tmp_path), **env}
    told = refused(out, data, wandb_log=True, wandb_project=project, env=env)
    assert told.startswith("wandb_log = True: W&B cannot start (") and reason in told and not out.exists()


def test_tensorboard_is_checked_before_anything_is_written(tmp_path, data, monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"^tensorboard = True: the package is missing; pip install tensorboard$"):
        trackers.check(parse(PlainTrainConfig, ["--tensorboard=True"], ""))


def test_losing_wandb_is_a_warning(tmp_path, data):
    settings = {**TINY, "dataset": data, "out_dir": tmp_path, "wandb_log": True, "max_iters": 300}
    env = {**os.environ, "WANDB_MODE": "offline", "MARK": str(tmp_path)}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": env}
    with start_process(command("train.py", **settings), **pipes) as process:
        wait_for_step(tmp_path, process, 5)
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):
                if (
                    b"wandb-core" in path.read_bytes()
                    and f"MARK={tmp_path}".encode() in (path.parent / "environ").read_bytes()
                ):
                    os.kill(int(path.parent.name), signal.SIGKILL)
        output, errors = process.communicate(timeout=120)
    assert process.returncode == 0 and "Traceback" not in errors, errors
    assert output.count("warning: lost W&B (") == 1 and len(rows(tmp_path, "train")) == 300


@pytest.mark.parametrize("closed, ranks", [("2>&-", 1), (">&-", 2)])
def test_closed_streams_and_odd_folders_fail_no_run(tmp_path, data, closed, ranks):
    out = os.fsencode(tmp_path) + b"/a$b$\xff \xc3\xa9"
    line = command(
        "train.py", ranks=ranks, **TINY | {"dataset": data, "max_iters": 2, "gradient_accumulation_steps": 2}
    )
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    shell: list[Any] = ["sh", "-c", f'exec "$@" {closed}', "sh", *line, b"--out_dir=" + out]
    done = subprocess.run(shell, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, capture_output=True, timeout=120)
    assert done.returncode == 0 and not done.stderr and Path(os.fsdecode(out), "loss.png").stat().st_size > 1000
    assert "finished step 2" in done.stdout.decode("ascii") or ranks == 2


@pytest.mark.parametrize("seconds", [0.2, 0.8])
def test_ctrl_c_while_importing_is_quiet(seconds):
    with start_process(command("train.py"), fresh=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        assert (process.communicate(timeout=60)[0], process.returncode) == (b"", -signal.SIGINT)
