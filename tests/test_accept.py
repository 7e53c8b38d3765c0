"""tools.accept: the whole table at tiny size, and what happens to a stage that fails, takes too long, or is stopped."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests import acceptance as accept
from tests.acceptance import Acceptance, Stage
from tests.running import ROOT, command, message, run, start_process, started_with
from training.errors import UserError

PIPES: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
TABLE = [*accept.correctness(False, Path("data"), "gpt2.py"), *accept.speed(False, "gpt2.py", "")]


def write_metrics(folder: Path, *losses: float, evals: tuple[float, ...] = ()) -> str:
    """A command that writes a run's metrics.jsonl."""
    speed = {"step_ms": 1.0, "tokens_per_second": 1.0, "mfu": None, "peak_memory_bytes": 1}
    rows: list[dict] = [{"kind": "eval", "step": 0, "val_loss": loss} for loss in evals]
    rows += [{"kind": "train", "step": n, "loss": loss, "grad_norm": 1.0, **speed} for n, loss in enumerate(losses)]
    path = folder / f"{len(list(folder.iterdir()))}.py"
    text = "".join(json.dumps(row) + "\n" for row in rows)
    files = {"metrics.jsonl": text, "config.json": "{}"}
    path.write_text(f"import pathlib, sys\nfor n, t in {files}.items(): pathlib.Path(sys.argv[1], n).write_text(t)")
    return f"{path} {{out}}"


@pytest.fixture
def acceptance(tmp_path) -> Acceptance:
    for name in ("runs", "results", "scripts"):
        (tmp_path / name).mkdir()
    return Acceptance(tmp_path / "runs", tmp_path / "results")


@pytest.fixture
def scripts(tmp_path, acceptance) -> Path:
    return tmp_path / "scripts"


def outcomes(acceptance: Acceptance) -> dict[str, tuple[str, str]]:
    return {name: (result["status"], result["reason"]) for name, result in acceptance.results.items()}


def test_every_stage_passes_on_the_cpu(copy, tmp_path):
    """In a copy of the repository, because the quickstart prepares its data set there."""
    assert run("-m", "tests.compile_ops").returncode == 0  # beside other tests this takes longer than a stage may
    line = command("-m", "tools.accept", device="cpu", write=tmp_path / "results", minutes=20)
    with start_process(line, cwd=copy, text=True, **PIPES) as process:
        output = process.communicate(timeout=900)[0]
    assert process.returncode == 0, output
    results = json.loads((tmp_path / "results" / "accept.json").read_text())
    stages = results["stages"]
    assert list(stages) == [stage.name for stage in TABLE] and len(TABLE) > 40
    for stage in TABLE:
        result = stages[stage.name]
        assert result["status"] == "ok" and result["seconds"] > 0 and f"{stage.name}: ok, " in output, stage.name
        assert str(tmp_path) not in result["command"]
        if stage.like:
            assert result["loss difference"] <= stage.within <= 0.1
        if stage.strategy and not stage.status:
            assert result["ms/step"] > 0 and result["peak GB"] > 0.1
        if stage.group == "alone" and not stage.status:
            assert result["tokens/s"] > 0 and (not stage.like or result["ratio"] > 0)
        if stage.group == "alone" and stage.strategy and not stage.status:
            assert 0 < result["planned GB"] < 0.1
    assert stages["resume_fsdp"]["loss difference"] == 0, "a resumed run is the undisturbed one"
    assert results["machine"]["torch"] and results["machine"]["deepspeed"]
    page = (tmp_path / "results" / "README.md").read_text()
    assert all(re.search(rf"^\| {stage.name} \| ok \|", page, re.M) for stage in TABLE)
    assert output.endswith((tmp_path / "results" / "summary.txt").read_text()) and f"{len(TABLE)} ok" in output
    assert not any("log" in result for result in stages.values()), "logs of stages that passed"


def test_a_failure_has_its_reason_and_the_others_run(acceptance, scripts):
    (scripts / "wrong.py").write_text(
        "print('a line of the log')\nraise SystemExit('error: n_layer = 0: must be above 0')"
    )
    (scripts / "good.py").write_text("print('The end')")
    stages = [
        Stage("wrong", "a", 60, "", f"{scripts}/wrong.py"),
        Stage("after_it", "a", 60, "", f"{scripts}/good.py", after="wrong"),
        Stage("good", "a", 60, "", f"{scripts}/good.py", prints="^The "),
        Stage("silent", "a", 60, "", f"{scripts}/good.py", prints="^try, in this order"),
        Stage("refused", "a", 60, "", f"{scripts}/wrong.py", status=1, prints="must be above"),
        Stage("no_checkpoint", "a", 60, "single", "--init_from=resume", after="good"),
        Stage("no_script", "a", 60, "", "./launch_nothing.sh"),
    ]
    assert not acceptance.run(stages)
    found = outcomes(acceptance)
    status, reason = found.pop("no_checkpoint")
    assert status == "FAILED" and reason.startswith("ValueError: max() "), "there is no checkpoint to resume from"
    assert found == {
        "wrong": ("FAILED", "status 1: n_layer = 0: must be above 0"),
        "after_it": ("not run", "needs wrong, which did not pass"),
        "good": ("ok", ""),
        "silent": ("FAILED", "did not print '^try, in this order'"),
        "refused": ("ok", ""),
        "no_script": ("FAILED", "FileNotFoundError: [Errno 2] No such file or directory: './launch_nothing.sh'"),
    }
    folder = acceptance.write
    logs = {name: result["log"] for name, result in acceptance.results.items() if result.get("log")}
    assert logs.keys() == {"silent", "wrong"} and logs["wrong"][0] == "a line of the log"
    assert folder
    summary = (folder / "summary.txt").read_text()
    assert re.search(r"^\[ +\d s\] wrong: FAILED, .* must be above 0\n +a line of the log\n", summary, re.M), summary
    text = accept.page({"device": "x"}, acceptance.results)
    assert re.search(r"^\| wrong \| FAILED \| [\d.]+ \| status 1: n_layer = 0: must be above 0 \|$", text, re.M)
    assert re.search(r"^\| after_it \| not run \| [\d.]+ \| needs wrong, which did not pass \|$", text, re.M)


def test_losses_are_compared_step_by_step(acceptance, scripts):
    good = write_metrics(scripts, 5.0, 4.0, 3.0, 2.0)
    lines = {
        "same": (good, "ok", ""),
        "near": (write_metrics(scripts, 5.0, 4.0, 3.0, 2.0 + 1e-5), "ok", ""),
        "far": (
            write_metrics(scripts, 5.0, 4.1, 3.0, 2.0),
            "FAILED",
            "losses differ from cpu by more than 0.0001",
        ),
        "nan": (
            write_metrics(scripts, 5.0, float("nan"), 3.0, 2.0),
            "FAILED",
            "losses differ from cpu by more",
        ),
        "short": (write_metrics(scripts, 5.0, 4.0), "FAILED", "KeyError: 2"),
        "worse": (
            write_metrics(scripts, 5.0, 4.0, 3.0, 2.0, evals=(5.0, 5.1)),
            "FAILED",
            "val loss was 5.0000 and became",
        ),
        "nothing": (f"{scripts}/empty.py", "FAILED", "KeyError: 'loss difference'"),
    }
    (scripts / "empty.py").write_text("")
    stages = [Stage(name, "a", 60, "", line, "cpu", 1e-4) for name, (line, _, _) in lines.items()]
    assert not acceptance.run([Stage("cpu", "a", 60, "", good), *stages])
    found = outcomes(acceptance)
    for name, (_, status, reason) in lines.items():
        assert found[name][0] == status and found[name][1].startswith(reason), found[name]


@pytest.mark.parametrize("gpu, status", [("NVIDIA H100 80GB HBM3", "FAILED"), ("NVIDIA A100-SXM4-80GB", "ok")])
def test_targets_are_those_of_some_gpus(acceptance, scripts, gpu, status):
    stage = Stage("slow", "a", 60, "", "x", at_least={"MFU": 0.5})
    stage.result |= {"MFU": 0.4, "of plan": 1.0}
    acceptance.gpu = gpu
    (acceptance.folder / "slow").mkdir()
    assert list(acceptance.problems(stage, "")) == (["MFU is not between 0.5 and inf"] if status == "FAILED" else [])


def test_a_stage_over_its_limit_is_killed_with_all_it_started(acceptance, scripts, monkeypatch):
    monkeypatch.setenv("MARK", str(scripts))
    (scripts / "hang.py").write_text("import subprocess\nsubprocess.run(['sleep', '600'])")
    (scripts / "good.py").write_text("")
    since = time.monotonic()
    late = Stage("late", "a", 1, "", f"{scripts}/hang.py")
    assert not acceptance.run([late, Stage("good", "a", 60, "", f"{scripts}/good.py")])
    assert time.monotonic() - since < 20
    assert outcomes(acceptance) == {"late": ("FAILED", "killed at its limit of 1 s"), "good": ("ok", "")}
    assert set(started_with(f"MARK={scripts}")) <= {str(os.getpid())}


def test_stages_that_do_not_fit_are_not_run(acceptance, scripts):
    acceptance.minutes = 0.5
    (scripts / "good.py").write_text("")
    stages = [Stage("long", "a", 90, "", f"{scripts}/good.py"), Stage("short", "a", 20, "", f"{scripts}/good.py")]
    assert not acceptance.run(stages)
    assert outcomes(acceptance) == {"long": ("not run", "too little time left of 0.5 minutes"), "short": ("ok", "")}


def test_stages_run_side_by_side_on_a_gpu(acceptance, scripts):
    """Each waits for a file of the other; the one that is alone begins when they have ended."""
    wait = "import sys, time; from pathlib import Path\nmine, other = map(Path, sys.argv[1:])\nmine.touch()\n"
    (scripts / "wait.py").write_text(wait + "while not other.exists(): time.sleep(0.01)\n")
    (scripts / "alone.py").write_text("")
    a, b = scripts / "a", scripts / "b"
    acceptance.side_by_side = 2
    stages = [
        Stage("a", "x", 60, "", f"{scripts}/wait.py {a} {b}"),
        Stage("b", "x", 60, "", f"{scripts}/wait.py {b} {a}"),
    ]
    assert acceptance.run([*stages, Stage("c", "alone", 60, "", f"{scripts}/alone.py")])
    assert list(acceptance.results)[-1] == "c"


def test_ctrl_c_keeps_the_results_so_far(tmp_path):
    line = command("-m", "tools.accept", device="cpu", write=tmp_path, only="fp32")
    with start_process(line, env={**os.environ, "OMP_NUM_THREADS": "1", "MARK": str(tmp_path)}, **PIPES) as process:
        while not (tmp_path / "summary.txt").exists() or "ok" not in (tmp_path / "summary.txt").read_text():
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 1
    stages = json.loads((tmp_path / "accept.json").read_text())["stages"]
    assert stages["cpu"]["status"] == "ok" and stages["zero3_offload"]["reason"] == "stopped"
    assert not started_with(f"MARK={tmp_path}")


def test_chosen_stages_bring_what_they_need():
    names = [stage.name for stage in accept.choose(TABLE, ["resume_f", "zero3_as"])]
    assert names == ["cpu", "fsdp", "zero3", "resume_fsdp", "zero3_as_single"]
    assert accept.choose(TABLE, [""]) == TABLE
    with pytest.raises(
        UserError, match="--only=nothing: no stage or group has this prefix; the groups are fp32, half, compile, "
    ):
        accept.choose(TABLE, ["fp32", "nothing"])


def test_without_a_gpu_cuda_is_one_message():
    env = {"CUDA_VISIBLE_DEVICES": ""}
    expected = "--device=cuda: no GPU is visible; --device=cpu runs the same stages at tiny size"
    assert message(run("-m", "tools.accept", env=env)) == expected


def test_the_table_for_gpus_is_that_for_cpus():
    """The same stages, and every command of it is one that the scripts take."""
    gpu = [
        *accept.correctness(True, Path("data"), "config/train_gpt2.py"),
        *accept.speed(True, "config/train_gpt2.py", ""),
    ]
    half = ("fp16_zero2", "fp16_zero3")  # DeepSpeed refuses them on many CPUs
    named = [(stage.name, stage.group) for stage in gpu if stage.name not in half]
    assert named == [(stage.name, stage.group) for stage in TABLE]
    for stage in gpu:
        if stage.strategy:
            line = stage.command(Path("out"))
            assert line[0] == sys.executable and (ROOT / line[1]).is_file()
            accept.parse(accept.RecipeConfig, [word for word in line[2:] if "resume" not in word], "")
    planned = {}
    for stage in gpu:
        if stage.group == "alone" and stage.strategy and not stage.status:
            planned[stage.name] = stage
    assert set(planned) >= {"eager_124m", "xl_fsdp", "xl_zero2", "medium"}
