"""benchmark.py, launched once: every number a strategy is to have, failures as rows, figures and the page."""

import json
import os
import re
import sys
from pathlib import Path

import pytest
from matplotlib.image import imread

import benchmark as script
from tests import browser
from tests.running import ROOT, TINY, command, message, run
from training.benchmark import results
from training.benchmark.breakdown import PARTS
from training.errors import UserError

SETTINGS = {**TINY, "gradient_accumulation_steps": 4, "dtype": "float32"}
del SETTINGS["max_iters"], SETTINGS["eval_interval"], SETTINGS["eval_iters"]


def benchmark(strategies: str, *options: str, **settings):
    return run("benchmark.py", f"--strategies={strategies}", *options, **settings)


@pytest.fixture(scope="module")
def measured(tmp_path_factory, data):
    """What it said, and the folder that it wrote: DDP, ZeRO-2, and one whose disk does not exist."""
    folder = tmp_path_factory.mktemp("benchmark")
    wanted = {**SETTINGS, "dataset": data, "out_dir": folder / "out", "nvme_path": "/proc/none"}
    done = benchmark("ddp,zero2,zero3_nvme", gpus=2, steps=6, write=folder / "results", **wanted)
    assert done.returncode == 1, done.stdout + done.stderr
    return done, folder / "results"


def test_every_number_of_a_strategy_is_there(measured):
    found = results.read(measured[1] / "benchmark.json")
    ddp, zero2, _ = found["rows"]
    assert [row["verdict"] for row in (ddp, zero2)] == ["baseline", "same"] and zero2["loss_difference"] <= 1e-5
    for row in (ddp, zero2):
        assert row["status"] == "ok" and row["ranks"] == 2 and row["steps_timed"] == 3 == len(row["losses"]) - 3
        low, high = row["tokens_per_second_quartiles"]
        assert 0 < low <= row["tokens_per_second"] <= high and row["start_s"] > 0.5
        assert row["mfu"] is None and 0 < row["ceiling_share"] < 1, "a CPU has no known peak, but a measured one"
        assert row["checkpoint_s"] > 0 and row["checkpoint_bytes"] > 12 * row["parameter_count"] / 2
        assert len(row["peak_bytes_by_rank"]) == 2 and row["peak_host_bytes"] == max(row["peak_bytes_by_rank"]) > 10**8
    assert zero2["memory"]["parameters"] == 4 * zero2["parameter_count"], "fp32, whole on every rank"
    for row, bytes_each in ((ddp, 8), (zero2, 12 / 2)):
        assert row["memory"]["optimizer_states"] == pytest.approx(bytes_each * row["parameter_count"], rel=0.02)
        assert row["measured_to_expected"] == pytest.approx(1, abs=0.05)


def test_the_parts_of_a_step_add_up_to_it(measured):
    for row in results.read(measured[1] / "benchmark.json")["rows"][:2]:
        parts = row["breakdown_ms"]
        assert sum(parts.values()) == pytest.approx(row["profiled_step_ms"], rel=0.05)
        assert tuple(parts) == PARTS and all(parts[name] >= 0 for name in PARTS), parts
        assert all(parts[name] > 0 for name in ("forward", "backward", "communication", "optimizer")), parts
        assert parts["offload"] == 0, "nothing is swapped"


def test_a_failure_is_a_row(measured):
    done, folder = measured
    row = results.read(folder / "benchmark.json")["rows"][2]
    assert row["status"] == "failed" and "/proc/none" in row["error"] and "tokens_per_second" not in row
    assert f"zero3_nvme: failed: {row['error']}" in (folder / "benchmark.md").read_text()
    assert re.search(r"^\[1/6\] round 1 of 1: ddp$", done.stdout, re.M)
    assert re.search(r"^\[5/6\] memory and breakdown: zero2 \(.* left\)$", done.stdout, re.M)
    assert not list(folder.parent.glob(".benchmark-*")), "run folders are left behind"


def test_figures_and_the_page(measured, tmp_path):
    _, folder = measured
    for name in ("throughput", "memory", "step", "losses"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    page = tmp_path / "report.html"
    done = run("plot.py", str(folder / "benchmark.json"), html=page)
    assert done.returncode == 0 and done.stdout == f"{page}\n", done.stderr
    text = page.read_text()
    assert text.count("<svg ") == 4 and "zero3_nvme" in text and "1 of 1 have the loss of ddp" in text
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids)), "ids of one figure are those of another"
    loaded = re.findall(r"""(?:src|href)="(?!#)([^"]+)|url\((?!#)([^)]+)|@import""", text)
    assert not loaded, "something is loaded from elsewhere"


@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_in_a_browser(measured, tmp_path, width):
    """Nothing sticks out, letters are large enough, and the picture is one."""
    browser.find()
    page, picture = tmp_path / "report.html", tmp_path / "page.png"
    assert run("plot.py", str(measured[1] / "benchmark.json"), html=page).returncode == 0
    seen = browser.look(page, width)
    assert seen["width"] == width == seen["content"] and seen["cells"] > 20
    assert seen["letters"] >= 13 and seen["svg_letters"] >= 8
    assert not seen["out"] or width > 1000, "on a phone"
    browser.screenshot(page, width, picture)
    pixels = imread(picture)
    assert pixels.shape[1] == width and pixels[..., :3].std() > 0.05, "an empty page"


@pytest.mark.skipif("NANOGPT" not in os.environ, reason="NANOGPT names no checkout of nanoGPT")
def test_nanogpt_beside_ours(tmp_path, data):
    checkout = Path(os.environ["NANOGPT"]).resolve()
    before = sorted(checkout.rglob("*"))
    wanted = {**SETTINGS, "dataset": data, "out_dir": tmp_path / "out"}
    done = benchmark("single", "--speed", steps=8, peer=checkout, write=tmp_path, **wanted)
    assert done.returncode == 0, done.stdout + done.stderr
    ours, theirs = json.loads((tmp_path / "benchmark.json").read_text())["rows"]
    assert theirs["strategy"] == "nanogpt" and theirs["verdict"] is None and theirs["ranks"] == 1
    assert ours["steps_timed"] == theirs["steps_timed"] == 5 and theirs["tokens_per_second"] > 0
    assert sorted(checkout.rglob("*")) == before, "the checkout was changed"


@pytest.mark.parametrize(
    "strategies, settings, told",
    [
        ("ddp,zero_2", {}, "--strategies=zero_2: unknown; did you mean zero2?"),
        ("ddp,ddp", {}, "--strategies: ddp stands there twice; keep one"),
        ("ddp", {"gpus": 3}, "gradient_accumulation_steps = 4: must be divisible by the 3 ranks that share it"),
        ("ddp", {"gpus": 4, "device": "auto"}, "--gpus=4: this machine has 0 GPUs; use fewer, or --device=cpu"),
        ("ddp", {"gpus": 4, "device": "cuda"}, "--gpus=4: this machine has 0 GPUs; use fewer, or --device=cpu"),
        ("ddp", {"steps": 4}, "--steps=4: must be 5 or more, as the first three are not timed"),
        ("ddp", {"batchsize": 4}, "batchsize = '4' (command line): unknown key; did you mean batch_size?"),
        ("single", {"peer": "tests"}, "--peer=tests: is no checkout of nanoGPT: it has no train.py; name the folder"),
        ("single", {"peer": "."}, "--peer=.: is no checkout of nanoGPT: it has no configurator.py; name the folder"),
    ],
)
def test_what_cannot_be_measured(monkeypatch, data, strategies, settings, told):
    settings = {**SETTINGS, "dataset": data, **settings}
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", command("benchmark.py", f"--strategies={strategies}", **settings)[1:])
    with pytest.raises(UserError) as raised:
        script.main()
    assert told in str(raised.value)


@pytest.mark.parametrize(
    "text, told",
    [
        ("{}", "is no results file of benchmark.py: it has no rows"),
        ("[", "is no results file of benchmark.py: Expecting value"),
        ('{"rows": []}', "has format 1, this code reads 2; measure it again: python benchmark.py"),
        ('{"format": 2, "rows": [{"status": "failed"}]}', "nothing to plot: no strategy has run to its end"),
    ],
)
def test_what_cannot_be_drawn(tmp_path, text, told):
    path = tmp_path / "benchmark.json"
    path.write_text(text)
    with pytest.raises(UserError) as raised:
        results.read(path)
    assert str(raised.value).startswith(f"{path}: {told}")


def test_wrong_options_are_told_in_one_message(data, tmp_path):
    assert message(benchmark("ddp,fsdp2", device="cpu")).startswith("--strategies=fsdp2: unknown; did you mean fsdp?")
    told = message(run("plot.py", str(tmp_path), html=tmp_path / "x.html"))
    assert told.endswith("is of a benchmark: name its benchmark.json, not a run folder")


def test_the_flag_of_the_train_scripts(tmp_path, data):
    settings = {**SETTINGS, "dataset": data, "out_dir": tmp_path, "steps": 8, "log_interval": 5, "max_iters": 4}
    done = run("train.py", "--benchmark", **settings)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^5 steps timed: median [\d.,]+ ms .*, MFU unknown, peak memory", done.stdout, re.M), done.stdout
    found = json.loads((tmp_path / "speed.json").read_text())
    assert found["steps_timed"] == 5 and found["fastest_ms"] <= found["step_ms"] <= found["slowest_ms"]
    assert "val loss" not in done.stdout and not (tmp_path / "checkpoints").exists()
    told = message(run("train.py", "--benchmark", **settings, init_from="resume"))
    assert "benchmark = True (command line): times a run of its own" in told
