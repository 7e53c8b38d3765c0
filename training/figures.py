"""Figures from metrics.jsonl."""

import json
from pathlib import Path
from typing import Any

from training.errors import UserError

X_LABELS = {"steps": "step", "tokens": "tokens", "seconds": "seconds of training"}


def read_run(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(train and eval rows of metrics.jsonl, config.json); UserError where there is nothing to draw."""
    try:
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        config = json.loads((folder / "config.json").read_text())
        rows = [json.loads(line) for line in lines if line.endswith("}")]  # a killed run can leave half a line
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is no run folder: {error}") from None
    drawn = [row for row in rows if row["kind"] in ("train", "eval")]
    if not drawn:
        raise UserError(f"{folder}: metrics.jsonl is empty; nothing to plot yet")
    return drawn, config


def positions(rows: list[dict[str, Any]], config: dict[str, Any], x: str) -> dict[int, float]:
    """step -> its place on the x axis. Seconds are those of training: sums of the measured step times."""
    if x == "seconds":
        seconds, previous, places = 0.0, 0, {}
        typical = sorted(r["step_ms"] for r in rows if r.get("step_ms")) or [0.0]
        for row in rows:
            ms = row.get("step_ms") or typical[len(typical) // 2]  # warm-up steps are not measured
            seconds += (row["step"] - previous) * ms / 1e3
            places[row["step"]], previous = seconds, row["step"]
        return places
    unit = config["gradient_accumulation_steps"] * config["batch_size"] * config["block_size"] if x == "tokens" else 1
    return {row["step"]: row["step"] * unit for row in rows}


def draw_loss(folders: list[Path], path: Path, x: str = "steps") -> None:
    """One PNG: training loss thin, evaluation loss with markers, a colour for each run."""
    import matplotlib  # not before it is wanted: it costs half a second

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), dpi=120, layout="constrained")
    for number, folder in enumerate(folders):
        rows, config = read_run(folder)
        places, color = positions(rows, config, x), f"C{number}"
        name = f"{folder.name}: " if len(folders) > 1 else ""
        train = [(places[r["step"]], r["loss"]) for r in rows if r["kind"] == "train"]
        evals = [(places[r["step"]], r["val_loss"]) for r in rows if r["kind"] == "eval"]
        if train:
            axes.plot(*zip(*train, strict=True), color=color, alpha=0.45, linewidth=1, label=f"{name}training batches")
        if evals:
            best = min(loss for _, loss in evals)
            label = f"{name}validation (best {best:.3f})"
            axes.plot(*zip(*evals, strict=True), color=color, marker="o", markersize=4, linewidth=2, label=label)
    axes.set_xlabel(X_LABELS[x])
    axes.set_ylabel("loss (nats per token)")
    if len(folders) == 1:
        axes.set_title(f"{folders[0].name}: {describe(config)}", fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    plt.close(figure)


def describe(config: dict[str, Any]) -> str:
    return f"{config['n_layer']} layers x {config['n_embd']} on {config['dataset']}"
