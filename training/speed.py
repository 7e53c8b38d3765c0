"""How fast a run was, of the rows of its metrics.jsonl: medians, as a step now and then waits for something else."""

import json
from pathlib import Path
from statistics import median
from typing import Any

from training.files import write_text

Rows = list[dict[str, Any]]


def train_rows(metrics: Path) -> Rows:
    """What metrics.jsonl has of training steps."""
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [row for row in rows if row["kind"] == "train"]


def of_rows(rows: Rows) -> dict[str, Any]:
    """Milliseconds a step, tokens/s over all ranks, mfu (None where the device's peak is unknown), bytes of rank 0.

    Each row is the mean of the steps since the one before; those that are warm-up have no time.
    """
    timed = [row for row in rows if row["step_ms"]]
    assert timed, "no step was timed"
    found = {name: median(row[name] for row in timed) for name in ("step_ms", "tokens_per_second")}
    fastest, slowest = (pick(row["step_ms"] for row in timed) for pick in (min, max))
    mfu = [row["mfu"] for row in timed if row["mfu"] is not None]
    return {
        "steps_timed": timed[-1]["step"] - rows[0]["step"] - 2,  # the first three steps are not
        **found,
        "fastest_ms": fastest,
        "slowest_ms": slowest,
        "mfu": median(mfu) if mfu else None,
        "peak_memory_bytes": max(row["peak_memory_bytes"] for row in rows),
    }


def summarise(metrics: Path) -> str:
    """Of a benchmark: speed.json beside its metrics, and a line for people."""
    found = of_rows(train_rows(metrics))
    write_text(metrics.with_name("speed.json"), json.dumps(found, indent=1) + "\n")
    mfu = "unknown" if found["mfu"] is None else f"{found['mfu']:.1%}"
    return (
        f"{found['steps_timed']} steps timed: median {found['step_ms']:,.1f} ms ({found['fastest_ms']:,.1f} to "
        f"{found['slowest_ms']:,.1f}), {found['tokens_per_second']:,.0f} tokens/s, MFU {mfu}, "
        f"peak memory of rank 0 {found['peak_memory_bytes'] / 1e9:,.2f} GB"
    )
