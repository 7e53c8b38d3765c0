"""The speed and memory of a benchmark run, from its metrics.jsonl."""

import json
from pathlib import Path
from statistics import median
from typing import Any

from training.checkpoint import write_text
from training.figures import read_rows
from training.metrics import WARM_UP_STEPS


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of the train rows that are timed, because a step now and then waits for something else.

    Milliseconds per step, tokens/s over all ranks, mfu (None where the device's peak is unknown), bytes of rank 0.
    """
    timed = [row for row in rows if row["step_ms"]]  # a row is the mean of the steps since the row before
    times = [row["step_ms"] for row in timed]
    return {
        "steps_timed": timed[-1]["step"] - rows[0]["step"] + 1 - WARM_UP_STEPS,
        "step_ms": median(times),
        "tokens_per_second": median(row["tokens_per_second"] for row in timed),
        "fastest_ms": min(times),
        "slowest_ms": max(times),
        "mfu": timed[0]["mfu"] and median(row["mfu"] for row in timed),
        "peak_memory_bytes": max(row["peak_memory_bytes"] for row in rows),
    }


def summarize_benchmark(metrics: Path) -> str:
    """Write speed.json beside metrics.jsonl; returns a line for people."""
    speed = summarize([row for _, row in read_rows(metrics) if row["kind"] == "train"])
    write_text(metrics.with_name("speed.json"), json.dumps(speed, indent=1) + "\n")
    mfu = "unknown" if speed["mfu"] is None else f"{speed['mfu']:.1%}"
    return (
        f"{speed['steps_timed']} steps timed: median {speed['step_ms']:,.1f} ms ({speed['fastest_ms']:,.1f} to "
        f"{speed['slowest_ms']:,.1f}), {speed['tokens_per_second']:,.0f} tokens/s, MFU {mfu}, "
        f"peak memory of rank 0 {speed['peak_memory_bytes'] / 1e9:,.2f} GB"
    )
