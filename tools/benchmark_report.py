"""Results of a benchmark: a row of comparable numbers for each strategy, and what the machine reaches."""

from statistics import mean, median, quantiles
from typing import Any

import numpy as np

from tools.benchmark_launches import Case
from training.speed import summarize

Row = dict[str, Any]
FORMAT = 2
# The largest difference of loss that counts as the same training. In half precision ZeRO rounds weights, norms and the
# residual stream, which DDP's autocast does not: up to 0.056 in the first steps of GPT-2 124M (results/speed_124m).
TOLERANCES = {"float32": 1e-5, "bfloat16": 0.1, "float16": 0.1}
# The same for the gradient norm in fp32, relative to it: correct strategies differ by less than 1e-6.
NORM_TOLERANCE = 1e-4


def make_rows(cases: list[Case], dtype: str) -> list[Row]:
    """A row for each case, compared with the first strategy that worked. dtype: of the matmuls."""
    base = next((case for case in cases if case.runs and not case.peer_folder), None)
    rows = []
    for case in cases:
        row: Row = {"strategy": case.name, "ranks": case.ranks, "status": case.status, "error": case.error}
        row["verdict"] = "not compared" if case.status == "ok" else case.status
        if case.runs and base:
            row |= speed(case, base)
            row |= {} if case.peer_folder else parity(case, base, dtype)
        if case.notes:
            row |= probed(case.notes)
            row["ceiling_share"] = row["tokens_per_second"] * row["flops_per_token"] / row["ceiling_flops"]
        rows.append(row | case.checkpoint)
    return rows


def probed(notes: list[Row]) -> Row:
    """The note of the rank with the largest model state, with the highest peaks and the mean parts of a step."""
    row = dict(max(notes, key=lambda note: note["model_state_bytes"]))
    peaks = [name for name in ("peak_host_bytes", "peak_device_bytes") if row[name] is not None]
    row |= {name: max(note[name] for note in notes) for name in peaks}
    row["breakdown_ms"] = {name: mean(note["breakdown_ms"][name] for note in notes) for name in row["breakdown_ms"]}
    row["ceiling_flops"] = sum(note["matmul_flops"] for note in notes)
    return row


def speed(case: Case, base: Case) -> Row:
    """Statistics of the timed steps. The ratio is taken round by round, because other load on the machine varies."""
    runs, base_runs = ([summarize(run) for run in one.runs] for one in (case, base))
    rates = [row["tokens_per_second"] for run in case.runs for row in run if row["step_ms"]]
    low, middle, high = quantiles(rates, n=4, method="inclusive")
    return {
        "step_ms": median(run["step_ms"] for run in runs),
        "steps_timed": len(rates),
        "tokens_per_second": middle,
        "tokens_per_second_quartiles": [low, high],
        "mfu": runs[0]["mfu"] and median(run["mfu"] for run in runs),
        "steps_per_second_ratio": median(b["step_ms"] / a["step_ms"] for a, b in zip(runs, base_runs, strict=False)),
        "start_s": median(case.starts),
        "losses": [[row["step"], row["loss"]] for row in case.runs[0]],
    }


def parity(case: Case, base: Case, dtype: str) -> Row:
    """Largest differences from the baseline, NaN if one is NaN, and the first step at which one is too large."""
    pairs, tolerance, fp32 = list(zip(base.runs[0], case.runs[0], strict=True)), TOLERANCES[dtype], dtype == "float32"
    losses = [abs(theirs["loss"] - own["loss"]) for theirs, own in pairs]
    norms = [abs((theirs["grad_norm"] or 0) - (own["grad_norm"] or 0)) for theirs, own in pairs]  # None: no clipping
    row = {"loss_difference": float(np.max(losses)), "grad_norm_difference": float(np.max(norms))}
    for (theirs, own), loss, norm in zip(pairs, losses, norms, strict=True):
        same_norm = not fp32 or norm <= NORM_TOLERANCE * (theirs["grad_norm"] or 0)
        if not (loss <= tolerance and same_norm):  # also if one is NaN
            error = f"at step {own['step']}, loss {own['loss']:.6f}, gradient norm {own['grad_norm']}; {base.name} has "
            error += f"{theirs['loss']:.6f} and {theirs['grad_norm']}; the tolerance is {tolerance:g}"
            error += f", for the norm {NORM_TOLERANCE:.2%}" if fp32 else ""
            return row | {"verdict": "DIFFERS", "status": "DIFFERS", "error": error}
    return row | {"verdict": "baseline" if case is base else "same" if fp32 else f"same within {dtype}"}


def machine(cases: list[Case], dtype: str) -> Row:
    """What tools.plan --measured reads, from the cases with most ranks; {} without probes.

    process_bytes: resident bytes of a rank before its model is built, the largest; matmul_flops: dtype -> FLOP/s of a
    rank while all ranks compute; link_bytes_per_second: bus bandwidth of an all-reduce between several ranks.
    """
    most = max(len(case.notes) for case in cases)
    notes = [note for case in cases if len(case.notes) == most for note in case.notes]
    result: Row = {}
    if most:
        result["process_bytes"] = max(note["process_bytes"] for note in notes)
        result["matmul_flops"] = {dtype: median(note["matmul_flops"] for note in notes)}
    if most > 1:
        result["link_bytes_per_second"] = median(note["link_bytes_per_second"] for note in notes)
    return result
