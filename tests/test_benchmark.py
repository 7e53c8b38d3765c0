"""tools.benchmark, launched once: every number of a strategy, failures as rows, figures and benchmark.md."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.running import ROOT, TINY, command, message, run, start_process
from tests.test_readme import COMMANDS
from tools import benchmark, benchmark_report
from tools.benchmark_probe import PARTS
from training.errors import UserError

SETTINGS = {**TINY, "gradient_accumulation_steps": 4, "dtype": "float32"}
del SETTINGS["max_iters"], SETTINGS["eval_interval"], SETTINGS["eval_iters"]


def run_benchmark(strategies: str, *options: str, **settings):
    return run("-m", "tools.benchmark", f"--strategies={strategies}", *options, **settings)


def read(path: Path) -> dict[str, Any]:
    results = json.loads(path.read_text())
    assert results["format"] == 2
    return results


@pytest.fixture(scope="module")
def measured(tmp_path_factory, data):
    """The finished process and its results: DDP, tensor parallelism, and a strategy whose disk is missing."""
    folder = tmp_path_factory.mktemp("benchmark")
    settings = {**SETTINGS, "dataset": data, "out_dir": folder / "out", "nvme_path": "/proc/none"}
    strategies = "ddp,zero1:tensor_parallel=2,zero3_nvme"
    done = run_benchmark(strategies, gpus=2, steps=6, write=folder / "results", **settings)
    assert done.returncode == 1, done.stdout + done.stderr
    return done, folder / "results"


def test_every_number_of_a_strategy_is_there(measured):
    results = read(measured[1] / "benchmark.json")
    ddp, split, _ = results["rows"]
    assert [row["verdict"] for row in (ddp, split)] == ["baseline", "same"]
    assert split["loss_difference"] <= 1e-5 and split["strategy"] == "zero1:tensor_parallel=2"
    for row in (ddp, split):
        assert row["status"] == "ok" and row["ranks"] == 2 and row["steps_timed"] == 3 == len(row["losses"]) - 3
        low, high = row["tokens_per_second_quartiles"]
        assert 0 < low <= row["tokens_per_second"] <= high and row["start_s"] > 0.1
        assert row["mfu"] is None and 0 < row["ceiling_share"] < 1, "a CPU has no known peak, but a measured one"
        assert row["checkpoint_s"] > 0 and row["checkpoint_bytes"] > 12 * row["parameter_count"] / 2
        assert row["peak_device_bytes"] is None and row["peak_host_bytes"] > 10**8
        assert tuple(row["breakdown_ms"]) == PARTS and row["breakdown_ms"]["offload"] == 0
        assert all(row["breakdown_ms"][part] > 0 for part in ("computation", "communication"))
    assert ddp["memory"]["parameters"] == 4 * ddp["parameter_count"], "fp32, whole on every rank"
    assert split["memory"]["parameters"] < 0.8 * ddp["memory"]["parameters"], "of which embeddings are whole"
    own = split["memory"]["parameters"] / ddp["memory"]["parameters"]
    for row, bytes_each in ((ddp, 8), (split, 12 * own)):
        assert row["memory"]["optimizer_states"] == pytest.approx(bytes_each * row["parameter_count"], rel=0.02)
        assert row["model_state_bytes"] == pytest.approx(row["expected_bytes"], rel=0.05)
    assert results["machine"].keys() == {"process_bytes", "matmul_flops", "link_bytes_per_second"}
    assert 10**8 < results["machine"]["process_bytes"] < ddp["peak_host_bytes"] * 2
    assert results["machine"]["matmul_flops"]["float32"] > 1e9 and results["machine"]["link_bytes_per_second"] > 1e6
    assert results["environment"]["device"] and "command" not in results["environment"]


def test_a_failure_is_a_row(measured):
    done, folder = measured
    row = read(folder / "benchmark.json")["rows"][2]
    assert row["status"] == "failed" and "/proc/none" in row["error"] and "tokens_per_second" not in row
    assert f"zero3_nvme: failed: {row['error']}" in (folder / "benchmark.md").read_text()
    assert re.search(r"^\[1/6\] round 1 of 1: ddp$", done.stdout, re.M)
    assert re.search(r"^\[5/6\] memory and parts of a step: zero1", done.stdout, re.M)
    assert not list(folder.parent.glob(".benchmark-*")), "run folders are left behind"


def test_figures_and_the_page(measured):
    done, folder = measured
    names = ["throughput.png", "memory.png", "step.png"]
    text = (folder / "benchmark.md").read_text()
    assert re.findall(r"!\[.+\]\((.+)\)", text) == names
    assert done.stdout.split()[-5:] == [str(folder / name) for name in ("benchmark.json", "benchmark.md", *names)]
    for name in names:
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert re.search(r"^\| zero1:tensor_parallel=2 \| same \| 2 \|", text, re.M) and "\n- steps: 6\n" in text
    assert "\n![step.png](step.png)\n\n| strategy | verdict | ranks |" in text
    assert "\n\nzero3_nvme: failed: " in text and text.count("\n| ") == 5, "titles, a rule, and three strategies"


def test_a_terminal_has_six_columns(measured):
    head, ddp, *_ = re.findall(r"^(?:strategy|ddp|zero).*$", measured[0].stdout, re.M)
    titles = ["strategy", "tokens/s", "steps/s, ratio", "process peak, MB", "loss difference", "verdict"]
    assert re.split("  +", head) == titles and re.fullmatch(r"ddp +[\d,]+ +1.00 +[\d,]+ +0.0e\+00 +baseline", ddp)


def test_pages_of_committed_results(tmp_path):
    """Files of earlier versions are in the same format."""
    paths = [path for path in ROOT.glob("results/*/benchmark.json") if path.parent.name != "mine"]
    assert len(paths) >= 3
    for path in paths:
        results = read(path)
        _, page, *_ = benchmark_report.write(results, tmp_path)
        assert page.read_text().count("\n| ") == 2 + len(results["rows"])


COMPARISONS = {command for command in COMMANDS if "tools.benchmark --compare" in command}


@pytest.mark.parametrize("line", sorted(COMPARISONS))
def test_the_documented_comparison(line, tmp_path, data):
    """The command of the pages, with a data set that is there: no strategy differs."""
    words = shlex.split(line)[1:]
    names = next(word.partition("=")[2].split(",") for word in words if word.startswith("--strategies="))
    done = run(*words, f"--write={tmp_path}", f"--dataset={data}")
    assert done.returncode == 0, done.stdout + done.stderr
    verdicts = {row["strategy"]: row["verdict"] for row in read(tmp_path / "benchmark.json")["rows"]}
    assert verdicts == {**dict.fromkeys(names, "same"), names[0]: "baseline"} and len(names) > 3
    table = done.stdout.split("\n\n")[1].splitlines()
    assert re.split("  +", table[0]) == ["strategy", "ranks", "loss difference", "gradient norm difference", "verdict"]
    assert len(table) == 1 + len(names) and "with --dtype=float32 --tf32=False" in done.stdout


def test_a_planted_fault_differs(copy, data):
    """Gradients of DDP that are too large by a thousandth. AdamW and clipping hide it from the loss."""
    clip, script = "        if self.cfg.grad_clip:\n", copy / "train.py"
    fault = "        for p in self.model.parameters() if self.ddp else ():\n            p.grad *= 1.001\n"
    assert script.read_text().count(clip) == 1
    script.write_text(script.read_text().replace(clip, fault + clip))
    words = ["--compare", "--strategies=single,ddp", "--steps=5", "config/train_debug.py", f"--dataset={data}"]
    line, pipe = [*command("-m", "tools.benchmark"), *words], subprocess.PIPE
    with start_process(line, cwd=copy, stdout=pipe, stderr=subprocess.STDOUT, text=True) as done:
        output = done.communicate(timeout=300)[0]
    assert done.returncode == 1, output
    number = r"(\d\.\d+)"
    expected = rf"^ddp: DIFFERS: at step 0, loss {number}, gradient norm {number}; single has {number} and {number}; "
    [numbers] = re.findall(expected, output, re.M)
    loss, norm, other_loss, other_norm = map(float, numbers)
    assert abs(loss - other_loss) <= 1e-5 and norm / other_norm == pytest.approx(1.001, abs=1e-5)


@pytest.mark.skipif("NANOGPT" not in os.environ, reason="NANOGPT names no checkout of nanoGPT")
def test_nanogpt_beside_ours(tmp_path, data):
    checkout = Path(os.environ["NANOGPT"]).resolve()
    before = sorted(checkout.rglob("*"))
    settings = {**SETTINGS, "dataset": data, "out_dir": tmp_path / "out"}
    done = run_benchmark("single", "--speed", steps=8, beside="tests.nanogpt", write=tmp_path, **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    ours, theirs = json.loads((tmp_path / "benchmark.json").read_text())["rows"]
    assert theirs["strategy"] == "tests.nanogpt single" and theirs["verdict"] == "not compared"
    assert ours["steps_timed"] == theirs["steps_timed"] == 5 and theirs["tokens_per_second"] > 0
    assert sorted(checkout.rglob("*")) == before, "the checkout was changed"


@pytest.mark.parametrize(
    "strategies, settings, expected",
    [
        ("ddp,zero_2", {}, "strategy 'zero_2': unknown; did you mean zero2?"),
        ("ddp", {"steps": 4}, "steps = 4 (command line): must be 5 or more with --benchmark, because the first three"),
        ("ddp", {"rounds": 0}, "--ranks=2, --rounds=0: both must be 1 or more"),
        ("ddp", {"batchsize": 4}, "batchsize = '4' (command line): unknown key; did you mean batch_size?"),
        ("ddp", {"batch-size": 0}, "batch_size = 0 (command line): must be above 0"),
        ("ddp", {"hostfile": "none"}, "none: no such hostfile"),
    ],
)
def test_what_cannot_be_measured(monkeypatch, data, strategies, settings, expected):
    settings = {**SETTINGS, "dataset": data, **settings}
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", command("-m", "tools.benchmark", f"--strategies={strategies}", **settings)[2:])
    with pytest.raises(UserError) as raised:
        benchmark.main()
    assert expected in str(raised.value)


def test_a_setting_against_those_of_compare(data):
    text = message(run_benchmark("ddp", "--compare", "--dtype=bfloat16", "--compile=False", dataset=data))
    assert text.startswith("--dtype=bfloat16: contradicts --compare, which sets --dtype=float32 --tf32=False ")
    text = message(run_benchmark("ddp,zero1:tensor_parallel=2:grad_clip=0", "--compare", dataset=data))
    assert text.startswith("--grad_clip=0: contradicts --compare, which sets ")


def test_wrong_options_are_one_message(data, tmp_path):
    text = message(run_benchmark("ddp,fsdp2", device="cpu"))
    assert text == "strategy 'fsdp2': unknown; did you mean fsdp?"
    text = message(run_benchmark("single,ddp", device="cpu", dataset=tmp_path))
    assert text.startswith(f"{tmp_path}") and "\n" not in text, "said once, not by each launch"


def test_the_flag_of_the_train_scripts(tmp_path, data):
    settings = {**SETTINGS, "dataset": data, "out_dir": tmp_path, "steps": 8, "log_interval": 5, "max_iters": 4}
    done = run("train.py", "--benchmark", **settings)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^5 steps timed: median [\d.,]+ ms .*, MFU unknown, peak memory", done.stdout, re.M), done.stdout
    speed = json.loads((tmp_path / "speed.json").read_text())
    assert speed["steps_timed"] == 5 and speed["fastest_ms"] <= speed["step_ms"] <= speed["slowest_ms"]
    assert "val loss" not in done.stdout and not (tmp_path / "checkpoints").exists()
    assert "benchmark = True (command line)" in message(run("train.py", "--benchmark", **settings, init_from="resume"))


def test_a_bare_loop_beside_each_strategy(tmp_path, data):
    """It trains: its loss falls as ours does."""
    settings = {**SETTINGS, "learning_rate": 1e-2, "dataset": data, "out_dir": tmp_path / "out"}
    settings |= {"beside": "tests.bare_loop", "gpus": 2, "steps": 8}
    done = run_benchmark("single,ddp,fsdp,zero2", "--speed", write=tmp_path, **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["strategy"]: row for row in read(tmp_path / "benchmark.json")["rows"]}
    for name in ("single", "ddp", "fsdp", "zero2"):
        ours, bare = (dict(rows[which]["losses"]) for which in (name, f"tests.bare_loop {name}"))
        assert ours[7] < ours[0] - 0.1 and bare[7] < bare[0] - 0.1 and abs(ours[0] - bare[0]) < 0.1
        assert all(rows[which]["peak_memory_bytes"] > 0 for which in (name, f"tests.bare_loop {name}"))
    assert message(run("-m", "tests.bare_loop", "fsdp_hsdp")).startswith("tests.bare_loop has no loop for fsdp_hsdp;")
    split = run("-m", "tests.bare_loop", "ddp", ranks=2, **{**TINY, "dataset": data, "sequence_parallel": 2})
    assert message(split) == "tests.bare_loop has no loop for tensor, pipeline, sequence or expert parallelism"
