"""The arithmetic of a benchmark: parts of a step from a trace, verdicts, memory, and the reason of a failure."""

from typing import Any

import pytest

from tools import benchmark_probe, benchmark_report
from tools.benchmark import explain, strategy_case
from tools.benchmark_report import Case
from training.speed import summarize

STEPS: list[dict[str, Any]] = [
    {"step": n, "loss": 5 - n / 10, "grad_norm": 1.0, "mfu": None, "peak_memory_bytes": 9} for n in range(6)
]
TIMES = (None, None, None, 100.0, 80.0, 120.0)
RUN: list[dict[str, Any]] = [
    {**s, "step_ms": ms, "tokens_per_second": ms and 1e5 / ms} for s, ms in zip(STEPS, TIMES, strict=True)
]


def event(name: str, start: float, end: float, cat: str = "cpu_op", tid: int = 1) -> dict:
    """start and end in milliseconds."""
    return {"ph": "X", "name": name, "cat": cat, "ts": start * 1e3, "dur": (end - start) * 1e3, "tid": tid}


STEP = event("step 5", 0, 100, "user_annotation")
ON_A_CPU = [
    STEP,
    event("aten::mm", -10, -5),  # before the step
    event("aten::mm", 6, 29),
    event("gloo:all_reduce", 20, 25, tid=2),  # hidden by a matmul
    event("aten::mm", 31, 50),
    event("gloo:all_reduce", 45, 65, tid=2),  # nothing is computed from 50 on
    event("autograd::engine::evaluate_function", 31, 65),  # includes the wait, so it is not computation
    event("aten::mm", 60, 62, tid=2),  # another thread
    event("aten::add_", 71, 90),
]
ON_A_GPU = [
    STEP,
    event("aten::mm", 5, 70),  # waits for its kernel
    event("kernel_mm", 6, 30, "kernel", 7),
    event("ncclDevKernel_AllGather", 10, 34, "kernel", 13),
    event("kernel_mm", 34, 60, "kernel", 7),
    event("Memcpy DtoH (Device -> Pinned)", 55, 68, "gpu_memcpy", 9),
    event("Memcpy DtoD (Device -> Device)", 80, 81, "gpu_memcpy", 9),
]


@pytest.mark.parametrize(
    "trace, expected",
    [
        (ON_A_CPU, {"computation": 61, "communication": 15, "offload": 0, "other": 24}),
        (ON_A_GPU, {"computation": 51, "communication": 4, "offload": 8, "other": 37}),
    ],
    ids=["CPU", "GPU"],
)
def test_the_parts_of_a_step(trace, expected):
    assert benchmark_probe.break_down(trace) == pytest.approx(expected)
    assert tuple(expected) == benchmark_probe.PARTS


def case(name: str, shift: float = 0, slower: float = 1) -> Case:
    """A case whose run is like RUN, with other losses and slower steps."""
    run = [{**row, "loss": row["loss"] + shift, "step_ms": row["step_ms"] and row["step_ms"] * slower} for row in RUN]
    return Case(name, 2, [], [], rounds=[{**summarize(run), "start_s": 1.5, "rows": run}])


@pytest.mark.parametrize(
    "dtype, shift, verdict",
    [
        *(("float32", 0.9e-5, "same"), ("float32", 1.1e-5, "DIFFERS"), ("float32", float("nan"), "DIFFERS")),
        *(("bfloat16", 0.099, "same within bfloat16"), ("bfloat16", 0.101, "DIFFERS")),
    ],
)
def test_the_verdict(dtype, shift, verdict):
    base, other = benchmark_report.make_rows([case("ddp"), case("zero2", shift, slower=2)], dtype)
    assert base["verdict"] == "baseline" and other["verdict"] == verdict
    assert base["step_ms"] == 100 and other["steps_per_second_ratio"] == 0.5
    assert base["tokens_per_second"] == 1000 and base["tokens_per_second_quartiles"] == pytest.approx([11e3 / 12, 1125])


def test_a_strategy_that_differs_fails_and_says_where():
    rows = benchmark_report.make_rows([case("ddp"), case("zero2", 0.5)], "float32")
    (last,) = benchmark_report.failures(rows)
    assert (rows[1]["status"], rows[1]["tokens_per_second"]) == ("DIFFERS", 1000)
    assert last.startswith(f"zero2: DIFFERS: at step {RUN[0]['step']}, loss {RUN[0]['loss'] + 0.5:.6f}, gradient norm ")


NORMS = [("float32", 1.0002, "DIFFERS"), ("float32", 1.00005, "same"), ("bfloat16", 1.5, "same within bfloat16")]


@pytest.mark.parametrize("dtype, scale, verdict", NORMS)
def test_a_gradient_norm_that_is_too_far(dtype, scale, verdict):
    other = case("zero2")
    other.rounds[0]["rows"][4]["grad_norm"] *= scale
    row = benchmark_report.make_rows([case("ddp"), other], dtype)[1]
    assert row["verdict"] == verdict
    if verdict == "DIFFERS":
        assert row["error"].startswith("at step 4, loss 4.600000, gradient norm 1.0002; ddp has 4.600000 and 1.0; ")


def test_the_baseline_is_the_first_strategy_that_works():
    broken = Case("ddp", 2, [], [], status="failed", error="no disk")
    rows = benchmark_report.make_rows([broken, case("zero1"), case("zero2")], "float32")
    assert [row["verdict"] for row in rows] == ["failed", "baseline", "same"]
    table = benchmark_report.make_table(rows, benchmark_report.COMPARED)
    assert table[1] == ("ddp", "2", "", "", "failed") and benchmark_report.failures(rows) == ["ddp: failed: no disk"]


def test_a_bare_loop_is_no_baseline():
    """Its batches are others."""
    broken, bare = Case("ddp", 2, [], [], status="failed", error="no disk"), case("bare ddp", 0.5, slower=2)
    bare.ours = False
    rows = benchmark_report.make_rows([broken, bare, case("zero2")], "float32")
    assert [row["verdict"] for row in rows] == ["failed", "not compared", "baseline"]
    assert rows[1]["steps_per_second_ratio"] == 0.5


def note(model_state: int, peak: int, **rates: float) -> dict:
    """What the probe of a GPU rank measured."""
    peaks = {"peak_device_bytes": peak, "peak_host_bytes": 7000, "process_bytes": 5000}
    rates = {"matmul_flops": 1e12, "flops_per_token": 1e8, **rates}
    return {"model_state_bytes": model_state, **peaks, **rates, "breakdown_ms": {"other": peak / 100}}


def test_a_probed_row_is_that_of_the_rank_with_the_largest_model_state():
    measured = case("ddp")
    measured.notes = [note(300, 900), note(400, 800)]
    (row,) = benchmark_report.make_rows([measured], "bfloat16")
    assert (row["model_state_bytes"], row["peak_device_bytes"], row["breakdown_ms"]) == (400, 900, {"other": 8.5})
    assert row["ceiling_flops"] == 2e12 and row["ceiling_share"] == 1000 * 1e8 / 2e12


def test_model_state_is_all_but_buffers_on_both_devices():
    census = {"cuda": {"buffers": 10, "parameters": 100, "gradients": 20}, "cpu": {"optimizer_states": 400}}
    assert benchmark_probe.model_state(census) == 520


def test_the_machine_is_measured_by_the_cases_with_most_ranks():
    single, ddp = case("single"), case("ddp")
    single.notes = [note(1, 1, matmul_flops=9e12)]
    ddp.notes = [note(1, 1, matmul_flops=flops, link_bytes_per_second=1e9) for flops in (1e12, 3e12)]
    flops = {"matmul_flops": {"bfloat16": 2e12}, "link_bytes_per_second": 1e9}
    assert benchmark_report.machine([single, ddp], "bfloat16") == {"process_bytes": 5000, **flops}
    one = {"process_bytes": 5000, "matmul_flops": {"bfloat16": 9e12}}
    assert benchmark_report.machine([single], "bfloat16") == one
    assert benchmark_report.machine([case("ddp")], "bfloat16") == {}


KILLED = "launch.ranks: rank 0 ended with signal 9 (SIGKILL): killed by hand, or out of memory (see dmesg)"


@pytest.mark.parametrize(
    "output, status, error",
    [
        (["x", "error: no disk", "launch.ranks: rank 1 ended"], "failed", "no disk"),
        (["error: 2 problems in the settings", "  a = 1: bad", "  b = 2: bad"], "failed", "a = 1: bad"),
        (["Traceback", "[rank1]: ValueError: x", "launch.ranks: rank 1 ended"], "failed", "ValueError: x"),
        (["x", "error: rank 0: CUDA out of memory. Tried"], "out of memory", "rank 0: CUDA out of memory. Tried"),
        (["error: no disk", KILLED], "failed", "no disk"),
        ([KILLED], "out of memory", KILLED),
        ([], "failed", "exit status 9 without output"),
    ],
)
def test_the_reason_of_a_failed_launch(output, status, error):
    assert explain(output, 9).args == (status, error)


def test_the_command_of_a_launch():
    launcher, arguments = ["-m", "LAUNCHER"], ["config/x.py", "--nvme_path=/x", "--seed=1"]
    hsdp = strategy_case("fsdp_hsdp", 8, launcher, arguments)
    assert hsdp.launcher[1:] == launcher
    assert hsdp.script == ["train.py", "config/x.py", "--seed=1", "--strategy=fsdp", "--shard_ranks=4"]
    json = "--deepspeed_config=deepspeed_configs/zero3_offload_config.json"
    assert strategy_case("zero3_offload", 8, launcher, arguments).script == ["train_deepspeed.py", *arguments, json]
    arguments += ["--tensor_parallel=2", "--sequence_parallel=2"]
    single = strategy_case("single", 1, launcher, arguments)
    alone = ["--sequence_parallel=2", "--sequence_parallel=1"]
    assert single.launcher[1:] == ["-m", "launch.ranks", "1"]
    assert single.script == ["train.py", "config/x.py", "--seed=1", *alone]
    split = strategy_case("zero1:tensor_parallel=4:seed=2", 8, launcher, arguments)
    assert split.name == "zero1:tensor_parallel=4:seed=2"
    assert split.script[-2:] == ["--tensor_parallel=4", "--seed=2"] and "--tensor_parallel=2" in split.script
