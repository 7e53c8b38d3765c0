"""The numbers of a benchmark for people: a table in the terminal; benchmark.md and benchmark.html with figures."""

import json
from collections.abc import Iterable
from contextlib import suppress
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from tools.benchmark_probe import PARTS
from tools.benchmark_report import FORMAT, Row
from tools.terminal import align
from training import figures
from training.errors import UserError

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
    "peak GPU memory, MB": "{peak_device_bytes:,.0f}",
    "peak process memory, MB": "{peak_host_bytes:,.0f}",
    "model state per rank, MB": "{model_state_bytes:,.1f}",
    "by formula, MB": "{expected_bytes:,.1f}",
    "start to first step, s": "{start_s:.1f}",
    "checkpoint, s": "{checkpoint_s:.2f}",
    "checkpoint, MB": "{checkpoint_bytes:,.1f}",
}
# In a terminal, and there with --compare. peak_bytes: of GPU memory, or on a CPU of the process
TERMINAL = {**COLUMNS, "peak memory, MB": "{peak_bytes:,.0f}"}
TITLES = ("strategy", "tokens/s", "steps/s, ratio", "peak memory, MB", "loss difference", "verdict")
COMPARED = ("strategy", "ranks", "loss difference", "gradient norm difference", "verdict")
PAGE = Template("""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Strategies side by side</title>
<style>
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: auto; padding: 0 1rem 2rem }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(max(18rem, 40%), 1fr)); gap: 1rem }
img { display: block; width: 100% }
.table { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: 0.3rem 0.6rem; text-align: right; vertical-align: bottom; border-bottom: 1px solid #8884 }
td { white-space: nowrap }
:is(th, td):nth-child(-n + 2) { text-align: left }
:is(th, td):first-child { position: sticky; left: 0; background: Canvas }
li { overflow-wrap: anywhere }
</style>
<h1>Strategies side by side</h1>
<div class="figures">$images</div>
<div class="table" tabindex="0"><table>$table</table></div>
$notes
<h2>How it was measured</h2>
<ul>$facts</ul>
""")


def make_table(rows: list[Row], forms: dict[str, str]) -> list[tuple[str, ...]]:
    """The titles, and the cells of each row, without the columns that no row has."""
    peaks = [{"peak_bytes": row.get("peak_device_bytes") or row.get("peak_host_bytes")} | row for row in rows]
    scaled = [{k: v / 1e6 if v and k.endswith("_bytes") else v for k, v in row.items()} for row in peaks]
    columns = [[title, *(cell(form, row) for row in scaled)] for title, form in forms.items()]
    return list(zip(*(column for column in columns if any(column[1:])), strict=True))


def cell(form: str, row: Row) -> str:
    try:
        return form.format_map(row)
    except (KeyError, TypeError):  # not measured: no such key, or None
        return ""


def failures(rows: list[Row]) -> list[str]:
    return [f"{row['strategy']}: {row['status']}: {row['error']}" for row in rows if row["status"] != "ok"]


def text_table(rows: list[Row], titles: tuple[str, ...]) -> str:
    """For a terminal, with a line for each failure."""
    table = align(make_table(rows, {title: TERMINAL[title] for title in titles}), ("strategy", "verdict"))
    return "\n\n".join([table, *failures(rows)])


def new_figure(rows: list[Row], caption: str) -> Any:
    """All figures of a page have the same size."""
    figure = figures.new_figure(4.8, max(2.4, 1 + 0.3 * len(rows)))
    figure.suptitle(caption, x=0.01, ha="left", fontsize=11)
    return figure


def bars(rows: list[Row], caption: str, parts: list[dict[str, float]]) -> Any:
    """A horizontal bar for each row, stacked from its parts, the first row on top; a failed row shows its status."""
    figure = new_figure(rows, caption)
    axes, ends = figure.add_subplot(), np.zeros(len(rows))
    names = dict.fromkeys(name for one in parts for name, size in one.items() if size)
    for name, color in zip(names, figures.COLORS, strict=False):
        sizes = np.array([one.get(name, 0) for one in parts])
        axes.barh([row["strategy"] for row in rows], sizes, 0.62, ends, color=color, label=name.replace("_", " "))
        ends = ends + sizes
    texts = [f"{end:,.0f}" if end else row["status"] for row, end in zip(rows, ends, strict=True)]
    axes.bar_label(axes.containers[-1], texts, padding=5)
    axes.set(xlim=(0, 1.15 * max(ends)), ylim=(len(rows) - 0.5, -0.5))  # room for the numbers
    axes.xaxis.set_visible(False)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.tick_params(length=0)
    if len(names) > 1:
        figure.legend(loc="outside lower left", ncols=3, frameon=False, handlelength=1)
    return figure


def losses(rows: list[Row]) -> Any:
    """The loss curves, on top of each other where strategies agree."""
    figure = new_figure(rows, "loss at each step, nats per token")
    axes = figure.add_subplot(xlabel="step")
    for number, row in enumerate(row for row in rows if "loss_difference" in row):
        steps, values = zip(*row["losses"], strict=True)
        axes.plot(steps, values, **figures.line_style(number), linewidth=1.2, label=row["strategy"])
    axes.locator_params("x", integer=True)
    figures.label_ends(axes)
    figures.style_axes(axes)
    return figure


def draw(rows: list[Row]) -> dict[str, Any]:
    """Name -> figure of everything that was measured."""
    rates = [{"tokens/s": row.get("tokens_per_second", 0)} for row in rows]
    memory = [{kind: size / 1e6 for kind, size in row.get("memory", {}).items()} for row in rows]
    steps = [row.get("breakdown_ms", {}) for row in rows]
    drawn = {}
    if any("loss_difference" in row for row in rows):
        drawn["throughput"] = bars(rows, "tokens per second, median of the timed steps", rates)
        drawn["losses"] = losses(rows)
    if any(memory):
        drawn["memory"] = bars(rows, "peak memory of the fullest rank, MB", memory)
        drawn["step"] = bars(rows, "a profiled step, mean over ranks, ms", steps)
    return drawn


def write_pages(results: dict[str, Any], folder: Path) -> list[Path]:
    """Write benchmark.md and benchmark.html, which have all numbers, and the figures that they show."""
    rows = results["rows"]
    drawn = {f"{name}.png": figure for name, figure in draw(rows).items()}
    for name, figure in drawn.items():
        figure.savefig(folder / name, dpi=160)
    facts = {**results["environment"], **{key: results[key] for key in ("dtype", "steps", "rounds")}}
    facts["settings"] = " ".join(results["arguments"])
    table, notes = make_table(rows, COLUMNS), failures(rows)
    content = list(drawn), table, notes, [f"{key}: {value}" for key, value in facts.items()]
    (folder / "benchmark.md").write_text(markdown(*content), encoding="utf-8")
    (folder / "benchmark.html").write_text(html(*content), encoding="utf-8")
    return [folder / name for name in ("benchmark.md", "benchmark.html", *drawn)]


def markdown(images: list[str], table: list[tuple[str, ...]], notes: list[str], facts: list[str]) -> str:
    text = "# Strategies side by side\n\n" + "".join(f"![{name}]({name})\n" for name in images) + "\n"
    numbers = len(table[0]) - 2
    for cells in (table[0], ("---", "---", *["---:"] * numbers), *table[1:]):
        text += f"| {' | '.join(cells)} |\n"
    text += "".join(f"\n{note}\n" for note in notes)
    return text + "\n## How it was measured\n\n" + "".join(f"- {fact}\n" for fact in facts)


def html(images: list[str], table: list[tuple[str, ...]], notes: list[str], facts: list[str]) -> str:
    def tags(tag: str, texts: Iterable[str]) -> str:
        return "".join(f"<{tag}>{escape(text)}</{tag}>" for text in texts)

    lines = [f"<tr>{tags('td' if number else 'th', cells)}</tr>\n" for number, cells in enumerate(table)]
    shown = "\n".join(f'<img src="{name}" alt="{name}">' for name in images)
    return PAGE.substitute(images=shown, table="".join(lines), notes=tags("p", notes), facts=tags("li", facts))


def read(path: Path) -> dict[str, Any]:
    """Raises UserError if the file is missing, or is not a benchmark.json of this format."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        results = json.loads(path.read_text())
        if results["format"] == FORMAT:
            return results
    fix = "write one with python -m tools.benchmark --write=FOLDER ..."
    raise UserError(f"{path}: is not a benchmark.json of format {FORMAT}; {fix}")
