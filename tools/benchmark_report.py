"""Results of a benchmark: comparable numbers of each strategy, in the terminal, and on a page with figures."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median, quantiles
from typing import Any

import numpy as np

from tools.benchmark_probe import PARTS
from training import figures

Row = dict[str, Any]
# The largest difference of loss that counts as the same training. In half precision ZeRO rounds weights, norms and the
# residual stream, which DDP's autocast does not: up to 0.056 in the first steps of GPT-2 124M (results/speed_124m).
TOLERANCES = {"float32": 1e-5, "bfloat16": 0.1, "float16": 0.1}
NORM_TOLERANCE = 1e-4  # the same for the gradient norm in fp32, relative to it: correct ones differ by less than 1e-6
COLUMNS = {  # title -> cell of a row whose bytes are in MB
    "strategy": "{strategy}",
    "verdict": "{verdict}",
    "ranks": "{ranks}",
    "loss difference": "{loss_difference:.1e}",
    "gradient norm difference": "{grad_norm_difference:.1e}",
    "tokens/s": "{tokens_per_second:,.0f}",
    "interquartile range": "{tokens_per_second_quartiles[0]:,.0f} to {tokens_per_second_quartiles[1]:,.0f}",
    "step, ms": "{step_ms:,.1f}",
    "steps/s, ratio": "{steps_per_second_ratio:.2f}",
    "MFU": "{mfu:.1%}",
    "share of matmul ceiling": "{ceiling_share:.1%}",
    **{f"{part}, ms": f"{{breakdown_ms[{part}]:,.1f}}" for part in PARTS},
    "GPU peak, MB": "{peak_device_bytes:,.0f}",
    "process peak, MB": "{peak_host_bytes:,.0f}",
    "peak of rank 0, MB": "{peak_memory_bytes:,.0f}",  # in the timed runs, by metrics.jsonl
    "model state per rank, MB": "{model_state_bytes:,.1f}",
    "by formula, MB": "{expected_bytes:,.1f}",
    "start to first step, s": "{start_s:.1f}",
    "checkpoint, s": "{checkpoint_s:.2f}",
    "checkpoint, MB": "{checkpoint_bytes:,.1f}",
}
# In a terminal, and there with --compare
TITLES = ("strategy", "tokens/s", "steps/s, ratio", "GPU peak, MB", "process peak, MB", "loss difference", "verdict")
COMPARED = ("strategy", "ranks", "loss difference", "gradient norm difference", "verdict")


@dataclass
class Case:
    """A strategy, and what its launches measured."""

    name: str
    ranks: int
    launcher: list[str]  # what starts a script on the ranks
    script: list[str]  # with its arguments
    ours: bool = True  # False: other code, of --beside
    rounds: list[dict[str, Any]] = field(default_factory=list)  # rows of metrics.jsonl with their summary, by launch
    notes: list[dict[str, Any]] = field(default_factory=list)  # the probe's, by rank
    checkpoint: dict[str, float] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    status: str = "ok"  # or "out of memory", "failed", "stopped"
    error: str | None = None


def make_rows(cases: list[Case], dtype: str) -> list[Row]:
    """A row for each case, compared with the first strategy that worked. dtype: of the matmuls."""
    base = next((case for case in cases if case.rounds and case.ours), None)
    rows = []
    for case in cases:
        row: Row = {"strategy": case.name, "ranks": case.ranks, "status": case.status, "error": case.error}
        row["verdict"] = "not compared" if case.status == "ok" else case.status
        if case.rounds and base:
            row |= speed(case, base)
            row |= parity(case, base, dtype) if case.ours else {}
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
    """The ratio is taken round by round, because other load on the machine varies."""
    ratios = [theirs["step_ms"] / own["step_ms"] for own, theirs in zip(case.rounds, base.rounds, strict=False)]
    rates = [row["tokens_per_second"] for one in case.rounds for row in one["rows"] if row["step_ms"]]
    low, middle, high = quantiles(rates, n=4, method="inclusive")
    return {
        "step_ms": median(one["step_ms"] for one in case.rounds),
        "steps_timed": len(rates),
        **{"tokens_per_second": middle, "tokens_per_second_quartiles": [low, high]},
        "mfu": case.rounds[0]["mfu"] and median(one["mfu"] for one in case.rounds),
        "steps_per_second_ratio": median(ratios),
        "start_s": median(one["start_s"] for one in case.rounds),
        "peak_memory_bytes": median(one["peak_memory_bytes"] for one in case.rounds) or None,  # 0: not measured
        "losses": [[row["step"], row["loss"]] for row in case.rounds[0]["rows"]],
    }


def parity(case: Case, base: Case, dtype: str) -> Row:
    """Largest differences from the baseline, NaN if one is NaN, and the first step at which one is too large."""
    pairs = list(zip(base.rounds[0]["rows"], case.rounds[0]["rows"], strict=True))
    tolerance, fp32 = TOLERANCES[dtype], dtype == "float32"
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

    process_bytes: of a rank before its model is built; matmul_flops: dtype -> FLOP/s of a rank while all ranks compute.
    """
    most = max(len(case.notes) for case in cases)
    notes = [note for case in cases if len(case.notes) == most for note in case.notes]
    result: Row = {}
    if notes:
        result["process_bytes"] = max(note["process_bytes"] for note in notes)
        result["matmul_flops"] = {dtype: median(note["matmul_flops"] for note in notes)}
    if most > 1:
        result["link_bytes_per_second"] = median(note["link_bytes_per_second"] for note in notes)
    return result


def make_table(rows: list[Row], titles: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The titles, and the cells of each row, without the columns that no row has."""
    scaled = [{k: v / 1e6 if v and k.endswith("_bytes") else v for k, v in row.items()} for row in rows]
    columns = [[title, *(cell(COLUMNS[title], row) for row in scaled)] for title in titles]
    return list(zip(*(column for column in columns if any(column[1:])), strict=True))


def cell(form: str, row: Row) -> str:
    try:
        return form.format_map(row)
    except (KeyError, TypeError):  # not measured: no such key, or None
        return ""


def failures(rows: list[Row]) -> list[str]:
    return [f"{row['strategy']}: {row['status']}: {row['error']}" for row in rows if row["status"] != "ok"]


def bars(rows: list[Row], caption: str, parts: list[dict[str, float]]) -> Any:
    """A horizontal bar for each row, stacked from its parts, the first row on top."""
    figure = figures.new_figure(6, max(2.4, 1.2 + 0.3 * len(rows)))
    axes, ends = figure.add_subplot(), np.zeros(len(rows))
    names = dict.fromkeys(name for one in parts for name, size in one.items() if size)
    for name, color in zip(names, figures.COLORS, strict=False):
        sizes = np.array([one.get(name, 0) for one in parts])
        axes.barh([row["strategy"] for row in rows], sizes, 0.62, ends, color=color, label=name.replace("_", " "))
        ends += sizes
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_title(caption, loc="left", fontsize=11)
    figures.style_axes(axes)
    figure.legend(loc="outside lower left", ncols=3, frameon=False, handlelength=1)
    return figure


def write(results: dict[str, Any], folder: Path) -> list[Path]:
    """Write benchmark.json, benchmark.md, which has all numbers, and figures of those that were measured."""
    (folder / "benchmark.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    rows = results["rows"]
    rates = [{"tokens/s": row["tokens_per_second"]} if "tokens_per_second" in row else {} for row in rows]
    memory = [{kind: size / 1e6 for kind, size in row.get("memory", {}).items()} for row in rows]
    charts = {
        "throughput.png": ("tokens per second, median of the timed steps", rates),
        "memory.png": ("peak memory of the fullest rank, MB", memory),
        "step.png": ("a profiled step, mean over ranks, ms", [row.get("breakdown_ms", {}) for row in rows]),
    }
    charts = {name: (caption, parts) for name, (caption, parts) in charts.items() if any(parts)}
    for name, (caption, parts) in charts.items():
        bars(rows, caption, parts).savefig(folder / name, dpi=160)
    facts = {**results["environment"], **{key: results[key] for key in ("dtype", "steps", "rounds")}}
    facts["settings"] = " ".join(results["arguments"])
    titles, *cells = make_table(rows, tuple(COLUMNS))
    rules = ["---", "---", *["---:"] * (len(titles) - 2)]
    lines = ["# Strategies side by side", "", *(f"![{name}]({name})" for name in charts), ""]
    lines += [f"| {' | '.join(line)} |" for line in (titles, rules, *cells)]
    lines += [f"\n{failure}" for failure in failures(rows)]
    lines += ["", "## How it was measured", "", *(f"- {key}: {value}" for key, value in facts.items())]
    (folder / "benchmark.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return [folder / name for name in ("benchmark.json", "benchmark.md", *charts)]
