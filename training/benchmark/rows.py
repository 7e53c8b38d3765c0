"""The rows of a benchmark: what the launches of each strategy brought, as numbers that can be compared."""

import math
from collections.abc import Callable, Iterable
from statistics import median, quantiles
from typing import Any

from training import speed
from training.benchmark import breakdown
from training.benchmark.rounds import Case

Row = dict[str, Any]
WITHIN = {"float32": 1e-5, "bfloat16": 0.02, "float16": 0.02}  # largest difference of loss that is the same training
# README.md, "Same loss", says why half precision differs: DDP's autocast keeps weights in fp32, ZeRO does not.


def of_cases(cases: list[Case], dtype: str) -> list[Row]:
    """One a case, in order; compared with the first that worked. dtype: of the matmuls."""
    base = next((case for case in cases if case.runs and case.strategy), None)
    return [of_case(case, base, dtype) for case in cases]


def of_case(case: Case, base: Case | None, dtype: str) -> Row:
    """A failure is told beside what was measured before it."""
    row: Row = {"strategy": case.name, "ranks": case.ranks, "status": "ok", "error": None}
    if case.failure:
        row |= {"status": case.failure.status, "error": case.failure.error}
    if case.runs and base:
        row |= of_runs(case, base) | (parity(case, base, dtype) if case.strategy else {"verdict": None})
    if case.notes:
        row |= of_memory(case.notes) | of_step(case.notes, row)
    return row


def of_runs(case: Case, base: Case) -> Row:
    """Speed: of all steps that were timed, the rounds together. Ratios are taken round by round."""
    found = speed.of_rows([row for run in case.runs for row in run])
    rates = [row["tokens_per_second"] for run in case.runs for row in run if row["step_ms"]]
    low, _, high = quantiles(rates, n=4, method="inclusive") if len(rates) > 1 else rates * 3
    own, theirs = ([median_ms(run) for run in one.runs] for one in (case, base))
    ratios = [b / a for a, b in zip(own, theirs, strict=False)]  # as other work on the machine comes and goes
    return {
        **{name: found[name] for name in ("step_ms", "fastest_ms", "slowest_ms", "tokens_per_second", "mfu")},
        "steps_timed": len(rates),
        "tokens_per_second_quartiles": [low, high],
        "rounds_ms": own,
        "steps_per_second_ratio": median(ratios),
        "start_s": median(case.starts),
        "losses": [[row["step"], row["loss"]] for row in case.runs[0]],
    }


def median_ms(run: list[Row]) -> float:
    return median(row["step_ms"] for row in run if row["step_ms"])


def parity(case: Case, base: Case, dtype: str) -> Row:
    pairs = list(zip(base.runs[0], case.runs[0], strict=True))
    loss, norm = (max(difference(a[key], b[key]) for a, b in pairs) for key in ("loss", "grad_norm"))
    same = "same" if dtype == "float32" else f"same within {dtype}"
    verdict = "baseline" if case is base else same if loss <= WITHIN[dtype] else "DIFFERS"
    return {"loss_difference": loss, "grad_norm_difference": norm, "tolerance": WITHIN[dtype], "verdict": verdict}


def difference(a: float | None, b: float | None) -> float:
    """Without clipping there are no norms; what is no number is as far away as can be."""
    apart = abs(a - b) if a is not None and b is not None else 0.0
    return math.inf if math.isnan(apart) else apart


def most(notes: Iterable[Row], key: Callable[[Row], Any]) -> Any:
    return max((key(note) for note in notes if key(note) is not None), default=None)


def of_memory(notes: list[Row]) -> Row:
    """Bytes; of ranks that differ, those of the one that has most.

    Activations are what the peak holds besides the model state, buffers and, in a host's memory, the interpreter with
    its libraries: estimated, as they are never there together with all of it.
    """
    note = max(notes, key=lambda one: sum(held(one)))
    device, host = (note["memory"].get(name, {}) for name in (note["device"], "cpu"))
    known = {**device, "interpreter": note["interpreter_bytes"] if note["device"] == "cpu" else 0}
    peak = note["peak_host_bytes"] if note["device"] == "cpu" else note["peak_device_bytes"]
    state = sum(held(note))
    return {
        "peak_device_bytes": most(notes, lambda one: one["peak_device_bytes"]),
        "peak_host_bytes": most(notes, lambda one: one["peak_host_bytes"]),
        "peak_bytes_by_rank": [one["peak_device_bytes"] or one["peak_host_bytes"] for one in notes],
        "memory": {**known, "activations": max(0, peak - sum(known.values()))},
        "host_memory": host if note["device"] != "cpu" else {},
        "model_state_bytes": state,
        "expected_bytes": note["expected_bytes"],
        "measured_to_expected": state / note["expected_bytes"],
        "buffer_bytes": sum(kinds["buffers"] for kinds in note["memory"].values()),
        "parameter_count": note["parameter_count"],
    }


def held(note: Row) -> list[int]:
    """The model state, wherever it lies: buffers are counted for themselves."""
    return [size for kinds in note["memory"].values() for kind, size in kinds.items() if kind != "buffers"]


def of_step(notes: list[Row], row: Row) -> Row:
    """The breakdown is the mean of the ranks; a step takes a little longer under the profiler."""
    if "breakdown_ms" not in notes[0]:  # --memory
        return {}
    ceiling = sum(note["ceiling_flops"] for note in notes)
    rate = row.get("tokens_per_second")
    return {
        "breakdown_ms": breakdown.mean([note["breakdown_ms"] for note in notes]),
        "profiled_step_ms": sum(note["wall_ms"] for note in notes) / len(notes),
        "ceiling_flops": ceiling,
        "ceiling_share": rate * notes[0]["flops_per_token"] / ceiling if rate else None,
        "checkpoint_s": max(note["checkpoint_s"] for note in notes),
        "checkpoint_bytes": max(note["checkpoint_bytes"] for note in notes),
    }
