"""A benchmark as a Markdown table: a line a strategy, numbers as people read them."""

from collections.abc import Callable
from typing import Any

from training.benchmark.breakdown import PARTS

Row = dict[str, Any]
Cell = Callable[[Row], str]


def plain(name: str, form: str, scale: float = 1) -> Cell:
    """Of a number; nothing where there is none."""

    def cell(row: Row) -> str:
        return "" if row.get(name) is None else format(row[name] / scale, form)

    return cell


def share(part: str) -> Cell:
    """Of the profiled step's time."""

    def cell(row: Row) -> str:
        found = row.get("breakdown_ms")
        return f"{found[part] / sum(found.values()):.0%}" if found else ""

    return cell


def verdict(row: Row) -> str:
    return row.get("verdict") or ("not compared" if row["status"] == "ok" else row["status"])


def spread(row: Row) -> str:
    low, high = row.get("tokens_per_second_quartiles", (None, None))
    return "" if low is None else f"{low:,.0f} to {high:,.0f}"


COLUMNS: dict[str, Cell] = {
    "strategy": lambda row: row["strategy"],
    "ranks": lambda row: str(row["ranks"]),
    "loss": verdict,
    "largest difference of loss": plain("loss_difference", ".1e"),
    "of gradient norm": plain("grad_norm_difference", ".1e"),
    "tokens/s": plain("tokens_per_second", ",.0f"),
    "half of the steps": spread,
    "step, ms": plain("step_ms", ",.1f"),
    "steps/s, ratio": plain("steps_per_second_ratio", ".2f"),
    "MFU": plain("mfu", ".1%"),
    "of the matmul ceiling": plain("ceiling_share", ".1%"),
    **{part: share(part) for part in PARTS},
    "peak of a device, MB": plain("peak_device_bytes", ",.0f", 1e6),
    "peak of a host process, MB": plain("peak_host_bytes", ",.0f", 1e6),
    "model state per rank, MB": plain("model_state_bytes", ",.1f", 1e6),
    "by the ZeRO paper's formula, MB": plain("expected_bytes", ",.1f", 1e6),
    "ratio": plain("measured_to_expected", ".3f"),
    "communication buffers, MB": plain("buffer_bytes", ",.1f", 1e6),
    "start to first step, s": plain("start_s", ".1f"),
    "checkpoint, s": plain("checkpoint_s", ".2f"),
    "checkpoint, MB": plain("checkpoint_bytes", ",.1f", 1e6),
}


def columns(rows: list[Row]) -> dict[str, list[str]]:
    """Name -> a cell a row; columns without any number are left out."""
    found = {name: [cell(row) for row in rows] for name, cell in COLUMNS.items()}
    return {name: cells for name, cells in found.items() if any(cells)}


def failures(rows: list[Row]) -> list[str]:
    return [f"{row['strategy']}: {row['status']}: {row['error']}" for row in rows if row["status"] != "ok"]


def markdown(rows: list[Row]) -> str:
    found = columns(rows)
    lines = [list(found), ["---"] * len(found), *zip(*found.values(), strict=True)]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
    return text + "".join(f"\n{line}\n" for line in failures(rows))
