"""The loss curves of runs, drawn from metrics.jsonl, and the style of all figures."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from training.errors import UserError

# Okabe and Ito's colors for the color-blind, without yellow, too light for text: https://jfly.uni-koeln.de/color/
COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8C8C8C", "#222222")
LOSSES = {"train": "loss", "eval": "val_loss"}  # kind of row -> the name of its main number
DASHES = ("-", (0, (5, 2)), (0, (2, 2)), (0, (7, 2, 1, 2)))  # keep curves visible that lie on top of each other


def read_run(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(train and eval rows of metrics.jsonl, config.json). Raises UserError if there is nothing to draw."""
    try:
        config = dict(json.loads((folder / "config.json").read_text()))
        rows = [row for _, row in read_rows(folder / "metrics.jsonl") if row["kind"] in LOSSES]
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{folder} is not a readable run folder: {error}; name the out_dir of a run") from None
    if not rows:
        raise UserError(f"{folder}: metrics.jsonl is empty; nothing to plot yet")
    return rows, config


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines of metrics.jsonl with their rows, one at a time, as files are large; damaged lines are left out."""
    with path.open(errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
                step, number = row["step"], row[LOSSES.get(row["kind"], "step")]
            except (ValueError, LookupError, TypeError, RecursionError):
                continue
            # a line without an end is being written, or a killed run left half of it
            if line.endswith("\n") and type(step) is int and type(number) in (int, float):
                yield line, row


def line_style(number: int) -> dict[str, Any]:
    """Color and dashes of curve `number`; curves of the same color have different dashes."""
    cycle, color = divmod(number, len(COLORS))
    return {"color": COLORS[color], "linestyle": DASHES[(color + cycle) % len(DASHES)]}


def new_figure(width: float, height: float) -> Any:
    """A matplotlib Figure; width and height in inches."""
    from matplotlib.figure import Figure  # half a second

    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def style_axes(axes: Any) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def label_ends(axes: Any) -> None:
    """Name the lines to the right of the axes, in their colors and in the order of their last values."""
    lines = sorted(axes.get_legend_handles_labels()[0], key=lambda line: -line.get_ydata()[-1])
    axes.legend(handles=lines, loc="upper left", bbox_to_anchor=(1, 1), frameon=False, labelcolor="linecolor")


def plot_losses(axes: Any, folders: Sequence[Path], x: str = "steps") -> None:
    """Plot the losses of runs over steps, tokens or seconds."""
    axes.set(xlabel=x, ylabel="loss (nats per token)")
    axes.set_title("validation loss with markers, loss of training batches thin", loc="left")
    for number, folder in enumerate(folders):
        rows, config = read_run(folder)
        size, style = step_size(rows, config, x), line_style(number)
        train = [(row["step"] * size, row["loss"]) for row in rows if row["kind"] == "train"]
        evals = [(row["step"] * size, row["val_loss"]) for row in rows if row["kind"] == "eval"]
        label = folder.resolve().name.encode(errors="replace").decode().replace("$", r"\$")  # a $ is no formula
        if train:
            axes.plot(*zip(*train, strict=True), **style, alpha=0.6, linewidth=1, label=None if evals else label)
        if evals:
            label += f", best {min(loss for _, loss in evals):.3f}"
            axes.plot(*zip(*evals, strict=True), **style, marker="o", markersize=4, linewidth=2, label=label)
    axes.locator_params("x", integer=True)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    style_axes(axes)
    label_ends(axes)


def step_size(rows: list[dict[str, Any]], config: dict[str, Any], x: str) -> float:
    """A step's length on the x axis; in seconds, that of the median step."""
    if x == "tokens":
        return config["gradient_accumulation_steps"] * config["batch_size"] * config["block_size"]
    if x == "seconds":
        return median([row["step_ms"] for row in rows if row.get("step_ms")] or [0]) / 1e3
    return 1
