"""tools.runs: the table of runs, the checkpoints of one, and folders that are damaged."""

import os
import re
import shutil
import subprocess
import sys
import time

import pytest

from tests.running import ROOT, rows, run, train, zero_json
from training.checkpoint import Checkpoints


@pytest.fixture(scope="module")
def folder(tmp_path_factory, data):
    """A run of one process with two checkpoints, and one of ZeRO-1 on two ranks, stopped before its end."""
    folder = tmp_path_factory.mktemp("runs")
    train(folder / "out-one", data, max_iters=20, eval_interval=10)
    train(folder / "out-zero1", data, ranks=2, gradient_accumulation_steps=2, deepspeed_config=zero_json("zero1"))
    for name, hours in (("out-one", 1), ("out-zero1", 2)):
        os.utime(folder / name / "metrics.jsonl", (time.time() - 3600 * hours,) * 2)
        os.utime(folder / name / "checkpoints", (0, 0))
        os.utime(folder / name / "environment.json", (0, 0))
    (folder / "data").mkdir()  # no run
    return folder


def table(*arguments: object) -> list[dict[str, str]]:
    """The rows of the last table that is printed, by title."""
    done = run("-m", "tools.runs", *map(str, arguments))
    assert (done.returncode, done.stderr) == (0, "")
    head, *lines = done.stdout.split("\n\n")[-1].splitlines()
    titles = re.split(" {2,}", head.strip())
    starts = [(head.index(title), head.index(title) + len(title)) for title in titles]
    found = []
    for line in lines:
        cells = [(match.start(), match.end(), match[0]) for match in re.finditer(r"\S+(?: \S+)*", line)]
        found.append(
            {
                title: next((text for left, right, text in cells if left == start or right == end), "")
                for title, (start, end) in zip(titles, starts, strict=True)
            }
        )
    return found


def best(out_dir) -> str:
    return f"{min(row['val_loss'] for row in rows(out_dir, 'eval')):.4f}"


def test_runs_are_listed_newest_first(folder):
    one, zero1 = table(folder)
    assert one["run"] == str(folder / "out-one") and zero1["run"] == str(folder / "out-zero1")
    assert (one["step"], one["newest checkpoint"], one["strategy"]) == ("20 of 20", "step_000020", "single")
    assert (zero1["step"], zero1["strategy"], zero1["ranks"]) == ("30 of 30", "zero1", "2")
    assert (one["best val loss"], zero1["best val loss"]) == (best(folder / "out-one"), best(folder / "out-zero1"))
    paths = [path for path in (folder / "out-one").rglob("*") if path.is_file()]
    assert one["size"] == f"{sum(path.stat().st_size for path in paths) / 1e6:.1f} MB"
    assert one["last change"] == time.strftime(
        "%Y-%m-%d %H:%M", time.localtime((folder / "out-one/metrics.jsonl").stat().st_mtime)
    )
    assert [row["run"] for row in table(folder / "out-zero1", folder / "out-one")] == [one["run"], zero1["run"]]


def test_the_checkpoints_of_a_run(folder):
    newest, older = table(folder / "out-one")
    losses = {row["step"]: f"{row['val_loss']:.4f}" for row in rows(folder / "out-one", "eval")}
    assert (newest["checkpoint"], newest["val loss"], newest["note"]) == ("step_000020", losses[20], "latest, best")
    assert (older["checkpoint"], older["val loss"], older.get("note", "")) == ("step_000010", losses[10], "")
    assert (newest["strategy"], newest["ranks"]) == ("single", "1")


def test_the_current_folder_is_the_default(folder):
    line = [sys.executable, "-m", "tools.runs"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["run", "out-one", "out-zero1"], done.stderr


DAMAGE = {
    "a missing file": lambda path: (path / "model.pt").unlink(),
    "a short file": lambda path: (path / "model.pt").write_bytes(b"short"),
    "no metadata": lambda path: (path / "checkpoint.json").unlink(),
    "half of the metadata": lambda path: (path / "checkpoint.json").write_text('{"step": 20, "files": {"mod'),
    "other metadata": lambda path: (path / "checkpoint.json").write_text('{"files": null}'),
    "no object": lambda path: (path / "checkpoint.json").write_text("[1, 2]"),
    "no text": lambda path: (path / "checkpoint.json").write_bytes(b"\xff\xfe\x00"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_shown_as_such(folder, tmp_path, name):
    shutil.copytree(folder / "out-one", tmp_path / "out")
    DAMAGE[name](tmp_path / "out/checkpoints/step_000020")
    newest, older = table(tmp_path / "out")
    assert newest["note"].startswith("damaged: ") and older.get("note", "") == ""
    [row] = table(tmp_path)
    assert (row["newest checkpoint"], row["note"]) == ("step_000010", "1 incomplete")
    assert [path.name for path in Checkpoints(str(tmp_path / "out")).intact()] == ["step_000010"], "of the same opinion"


def test_a_run_that_was_killed(folder, tmp_path):
    """Half a line of metrics, an unfinished checkpoint, and a run before its first one."""
    shutil.copytree(folder / "out-one", tmp_path / "killed")
    with (tmp_path / "killed/metrics.jsonl").open("a") as file:
        file.write('{"kind": "eval", "step": 9000, "val')
    (tmp_path / "killed/checkpoints/step_000020").rename(tmp_path / "killed/checkpoints/unfinished_step_000020")
    newest, older = table(tmp_path / "killed")
    assert newest["note"].startswith("unfinished: ") and older["checkpoint"] == "step_000010"
    (tmp_path / "young").mkdir()
    for name in ("config.json", "environment.json"):
        shutil.copy(folder / "out-one" / name, tmp_path / "young")
    found = {row["run"]: row for row in table(tmp_path)}
    killed, young = found[str(tmp_path / "killed")], found[str(tmp_path / "young")]
    assert (killed["step"], killed["newest checkpoint"]) == ("20 of 20", "step_000010")
    assert (young["step"], young["newest checkpoint"]) == ("0 of 20", "none")
    assert run("-m", "tools.runs", str(tmp_path / "young")).stdout.endswith("\n\nno checkpoint yet\n")


def test_where_there_is_no_run(tmp_path):
    done = run("-m", "tools.runs", str(tmp_path))
    assert done.stderr == f"python -m tools.runs: error: no run in {tmp_path}; name the out_dir of a run\n"
    assert done.returncode == 2
    assert "unrecognized arguments: --all" in run("-m", "tools.runs", "--all").stderr


def test_it_starts_without_torch(folder):
    code = f"import runpy, sys; sys.argv[1:] = [{str(folder)!r}]; runpy.run_module('tools.runs', run_name='__main__'); "
    code += "assert not {'torch', 'numpy'} & sys.modules.keys()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
