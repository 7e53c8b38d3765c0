"""The arithmetic of a benchmark: parts of a step from a trace, verdicts, memory, and what a failure said."""

from typing import Any

import pytest

from training.benchmark import breakdown, launches, report, rows, strategies, table
from training.benchmark.launches import Ended, Failure
from training.benchmark.rounds import Case
from training.errors import UserError

STEPS: list[dict[str, Any]] = [
    {"step": n, "loss": 5 - n / 10, "grad_norm": 1.0, "mfu": None, "peak_memory_bytes": 9} for n in range(6)
]
TIMES = (None, None, None, 100.0, 80.0, 120.0)
RUN: list[dict[str, Any]] = [
    {**s, "step_ms": ms, "tokens_per_second": ms and 1e5 / ms} for s, ms in zip(STEPS, TIMES, strict=True)
]


def event(name: str, start: float, end: float, cat: str = "cpu_op", tid: int = 1) -> dict:
    """Milliseconds."""
    return {"name": name, "cat": cat, "ts": start * 1e3, "dur": (end - start) * 1e3, "tid": tid}


MARKS = [
    event(name, start, end, "user_annotation")
    for name, start, end in (("step", 0, 100), ("forward", 5, 30), ("backward", 30, 70))
]
ON_A_CPU = [
    *MARKS,
    event("aten::mm", 6, 29),
    event("gloo:all_reduce", 20, 25, tid=2),  # beside a matmul: hidden
    event("aten::mm", 31, 50),
    event("gloo:all_reduce", 45, 65, tid=2),  # from 50 on nothing is computed
    event("autograd::engine::evaluate_function", 31, 65),  # around the waiting: no computing itself
    event("aten::mm", 60, 62, tid=2),  # of another thread
    event("aten::add_", 71, 90),
    event("swap", 90, 98, "user_annotation"),
]
ON_A_GPU = [
    *MARKS,
    event("aten::mm", 5, 70),  # waits for its kernel
    event("kernel_mm", 6, 30, "kernel", 7),
    event("ncclDevKernel_AllGather", 10, 34, "kernel", 13),
    event("kernel_mm", 34, 60, "kernel", 7),
    event("Memcpy DtoH (Device -> Pinned)", 55, 68, "gpu_memcpy", 9),
    event("Memcpy HtoD (Pageable -> Device)", 1, 3, "gpu_memcpy", 9),  # of the batch: not in a part
    event("Memcpy DtoD (Device -> Device)", 80, 81, "gpu_memcpy", 9),
]


@pytest.mark.parametrize(
    "trace, expected",
    [
        (ON_A_CPU, {"forward": 25, "backward": 25, "communication": 15, "optimizer": 22, "offload": 8, "other": 5}),
        (ON_A_GPU, {"forward": 25, "backward": 28, "communication": 4, "optimizer": 30, "offload": 8, "other": 5}),
    ],
    ids=["CPU", "GPU"],
)
def test_the_parts_of_a_step(trace, expected):
    (found,) = breakdown.parts(trace)
    assert found == pytest.approx(expected) and sum(found.values()) == pytest.approx(100)
    assert breakdown.mean([found, dict.fromkeys(breakdown.PARTS, 0.0)]) == pytest.approx(
        {name: ms / 2 for name, ms in expected.items()}
    )


def case(name: str, shift: float = 0, slower: float = 1) -> Case:
    """Of a run like RUN, its losses moved and its steps slower."""
    run = [{**row, "loss": row["loss"] + shift, "step_ms": row["step_ms"] and row["step_ms"] * slower} for row in RUN]
    return Case(name, 2, strategies.of(name, 2), [run], [1.5])


@pytest.mark.parametrize(
    "dtype, shift, verdict",
    [
        *(("float32", 0.9e-5, "same"), ("float32", 1.1e-5, "DIFFERS"), ("float32", float("nan"), "DIFFERS")),
        *(("bfloat16", 0.019, "same within bfloat16"), ("bfloat16", 0.021, "DIFFERS")),
    ],
)
def test_the_verdict(dtype, shift, verdict):
    base, other = rows.of_cases([case("ddp"), case("zero2", shift, slower=2)], dtype)
    assert base["verdict"] == "baseline" and other["verdict"] == verdict
    assert base["step_ms"] == 100 and other["steps_per_second_ratio"] == 0.5
    assert base["tokens_per_second"] == 1000 and base["tokens_per_second_quartiles"] == pytest.approx([11e3 / 12, 1125])


def test_what_fails_first_is_no_baseline():
    broken = Case("ddp", 2, strategies.of("ddp", 2), failure=Failure("failed", "no disk"))
    found = rows.of_cases([broken, case("zero1"), case("zero2")], "float32")
    assert [row.get("verdict") for row in found] == [None, "baseline", "same"]
    assert table.failures(found) == ["ddp: failed: no disk"]
    told = report.summary({"rows": found})
    assert told == "2 of 3 ran to their end. 1 of 1 have the loss of zero1; the largest difference is 0.0e+00."


def note(optimizer_states: int, peak: int, host: int = 0) -> dict:
    """Of a GPU rank, all of whose other model state is 100 bytes of parameters and 100 of gradients."""
    held = {"buffers": 10, "parameters": 100, "gradients": 100, "optimizer_states": optimizer_states}
    on_host = {"buffers": 0, "parameters": 0, "gradients": 0, "optimizer_states": host}
    whole = {"memory": {"cuda": held, "cpu": on_host}, "device": "cuda", "interpreter_bytes": 5000}
    peaks = {"peak_device_bytes": peak, "peak_host_bytes": 7000}
    return {**whole, **peaks, "expected_bytes": 1000, "parameter_count": 50}


def test_memory_is_of_the_rank_that_has_most():
    found = rows.of_memory([note(300, 900), note(400, 800, host=400)])
    assert found["memory"]["activations"] == 800 - 610 and found["memory"]["interpreter"] == 0
    assert (found["peak_device_bytes"], found["peak_bytes_by_rank"]) == (900, [900, 800])
    assert (found["model_state_bytes"], found["measured_to_expected"], found["buffer_bytes"]) == (1000, 1.0, 10)
    assert found["host_memory"]["optimizer_states"] == 400


@pytest.mark.parametrize(
    "said, told",
    [
        (["x", "error: no disk", "launch.py: rank 1 ended"], Failure("failed", "no disk")),
        (["error: 2 problems in the settings", "  a = 1: bad", "  b = 2: bad"], Failure("failed", "a = 1: bad")),
        (["Traceback", "[rank1]: ValueError: x", "launch.py: rank 1 ended"], Failure("failed", "ValueError: x")),
        (
            ["error: rank 0: CUDA out of memory. Tried to", "  by formula", "  to try, in this order:", "    --a=1"],
            Failure("out of memory", "rank 0: CUDA out of memory. Tried to; try --a=1"),
        ),
        (
            ["launch.py: rank 0 ended with signal 9 (SIGKILL): killed by hand, or for memory (see dmesg)"],
            Failure(
                "out of memory",
                "launch.py: rank 0 ended with signal 9 (SIGKILL): killed by hand, or for memory (see dmesg)",
            ),
        ),
        ([], Failure("failed", "ended with status 9, without a word")),
    ],
)
def test_a_failed_launch_in_a_line(said, told):
    assert launches.failure(Ended(9, said)) == told and launches.failure(Ended(0, said)) is None


def test_strategies_are_scripts_and_arguments():
    assert strategies.of("single", 8).ranks == 1
    hsdp, zero = strategies.of("fsdp_hsdp", 8), strategies.of("zero3_offload", 8)
    assert hsdp.script == ("train.py", "--strategy=fsdp", "--shard_ranks=4")
    assert zero.script[1] == "--deepspeed_config=deepspeed_configs/zero3_offload_config.json"
    assert zero.takes("--nvme_path=/x") and not hsdp.takes("--nvme_path=/x") and hsdp.takes("config/train_debug.py")
    with pytest.raises(UserError, match="did you mean fsdp_offload"):
        strategies.find(["ddp", "fsdp_ofload"], 2)
