"""loss.png, drawn from metrics.jsonl, and the style of all figures."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from training.errors import UserError, count

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
    """The lines of metrics.jsonl with their rows, one at a time, as files are large; warns of damaged ones."""
    damaged = []
    with path.open(errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith("\n"):  # it is being written, or a killed run left half of it
                continue
            try:
                row = json.loads(line)
                is_row = type(row["step"]) is int and type(row[LOSSES.get(row["kind"], "step")]) in (int, float)
            except (ValueError, LookupError, TypeError, RecursionError):
                is_row = False
            if is_row:
                yield line, row
            else:
                damaged.append(number)
    if damaged:
        lines = count(len(damaged), "damaged line")
        print(f"warning: {path}: left out {lines}, the first is line {damaged[0]}", file=sys.stderr, flush=True)


def line_style(number: int) -> dict[str, Any]:
    """Color and dashes of curve `number`; curves of the same color have different dashes."""
    cycle, color = divmod(number, len(COLORS))
    return {"color": COLORS[color], "linestyle": DASHES[(color + cycle) % len(DASHES)]}


def new_figure(width: float, height: float, layout: Any = "constrained") -> Any:
    """A matplotlib Figure; width and height in inches."""
    from matplotlib.figure import Figure  # half a second

    return Figure(figsize=(width, height), dpi=120, layout=layout)


def style_axes(axes: Any) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def label_ends(axes: Any) -> None:
    """Write the label of each line at its end, in its color; labels that would overlap are moved apart."""
    axes.get_ylim()  # computes the limits, on which transData depends
    line_height = 0.18 * axes.figure.dpi / axes.bbox.height  # of text: 0.18 inches, as a fraction of the axes
    height, labeled = -1.0, [line for line in axes.lines if not line.get_label().startswith("_")]
    for line in sorted(labeled, key=lambda line: line.get_ydata()[-1]):
        end, color = line.get_xydata()[-1], line.get_color()
        height = max(height + line_height, (axes.transData - axes.transAxes).transform(end)[1])
        arrow = {"arrowstyle": "-", "color": color, "linewidth": 0.6, "relpos": (0, 0.5)}
        axes.annotate(line.get_label(), end, (1.05, height), "data", "axes fraction", arrow, color=color, va="center")


def draw_run(axes: Any, rows: list[dict[str, Any]], number: int = 0, name: str = "", step_size: float = 1) -> None:
    """Training loss as a thin line, validation loss with markers. name: of one of several runs."""
    style = line_style(number)
    train = [(row["step"] * step_size, row["loss"]) for row in rows if row["kind"] == "train"]
    evals = [(row["step"] * step_size, row["val_loss"]) for row in rows if row["kind"] == "eval"]
    if train:
        label = None if name and evals else name or "training batches"
        axes.plot(*zip(*train, strict=True), **style, alpha=0.6, linewidth=1, label=label)
    if evals:
        label = f"{name or 'validation'}, best {min(loss for _, loss in evals):.3f}"
        axes.plot(*zip(*evals, strict=True), **style, marker="o", markersize=4, linewidth=2, label=label)
    axes.locator_params("x", integer=True)
    axes.set_ylabel("loss (nats per token)")
    style_axes(axes)


def draw_loss(folder: Path, path: Path) -> None:
    """Write the PNG of one run."""
    rows, config = read_run(folder)
    figure = new_figure(8, 5, layout="none")  # fixed margins: to compute them takes as long as everything else
    figure.subplots_adjust(left=0.08, right=0.75, bottom=0.1, top=0.93)
    axes = figure.add_subplot(xlabel="step")
    draw_run(axes, rows)
    label_ends(axes)
    name = folder.name.encode(errors="replace").decode()
    about = f"{name}: {config.get('n_layer')} layers x {config.get('n_embd')} on {config.get('dataset')}"
    axes.set_title(about, loc="left", parse_math=False)  # a $ is no formula
    figure.savefig(path)
