"""Figures from metrics.jsonl, and what all figures look like."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind people can tell apart; https://jfly.uni-koeln.de/color/
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8C8C8C", "#F0E442")
DASHES = ("-", (0, (5, 2)), (0, (2, 2)), (0, (7, 2, 1, 2)))  # curves that lie on one another are all seen
X_LABELS = {"steps": "step", "tokens": "tokens", "seconds": "seconds of training"}


def read_run(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(train and eval rows of metrics.jsonl, config.json); UserError where there is nothing to draw."""
    try:
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        config = json.loads((folder / "config.json").read_text())
        rows = [json.loads(line) for line in lines if line.endswith("}")]  # a killed run can leave half a line
    except FileNotFoundError as error:
        missing = Path(error.filename).name
        raise UserError(f"{folder} is no run folder: it has no {missing}; name the out_dir of a run") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is no run folder that can be read: {error}") from None
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


def look(number: int) -> dict[str, Any]:
    """Of the curve of a run: of runs with the same colour, the dashes differ."""
    again, colour = divmod(number, len(COLOURS))
    return {"color": COLOURS[colour], "linestyle": DASHES[(colour + again) % len(DASHES)]}


def new(width: float, height: float) -> "Figure":
    """Inches."""
    from matplotlib.figure import Figure  # not before it is wanted: it costs half a second

    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def tidy(axes: "Axes", grid: str = "both") -> None:
    axes.grid(alpha=0.25, axis=grid)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def strategy_of(folder: Path, config: dict[str, Any]) -> str:
    """Of a run, with its number of ranks; as far as its folder tells."""
    ranks, strategy = 1, config.get("strategy") or "ddp"
    if (folder / "environment.json").exists():
        ranks = json.loads((folder / "environment.json").read_text())["world_size"]
    if (folder / "deepspeed.json").exists():
        zero = json.loads((folder / "deepspeed.json").read_text()).get("zero_optimization", {})
        devices = [zero.get(f"offload_{what}", {}).get("device") for what in ("optimizer", "param")]
        strategy = f"zero{zero.get('stage', 0)}" + "_nvme" * ("nvme" in devices)
        strategy += "_offload" * ("cpu" in devices and "nvme" not in devices)
    return f"{strategy} x {ranks}" if ranks > 1 or strategy != "ddp" else "one process"


def draw_loss(folders: list[Path], path: Path, x: str = "steps") -> None:
    """One PNG: training loss thin, evaluation loss with markers, a colour and dashes for each run."""
    figure = new(8, 5)
    axes = figure.add_subplot()
    for number, folder in enumerate(folders):
        rows, config = read_run(folder)
        places, style = positions(rows, config, x), look(number)
        name = f"{folder.name}, {strategy_of(folder, config)}: " if len(folders) > 1 else ""
        train = [(places[r["step"]], r["loss"]) for r in rows if r["kind"] == "train"]
        evals = [(places[r["step"]], r["val_loss"]) for r in rows if r["kind"] == "eval"]
        if train:
            axes.plot(*zip(*train, strict=True), **style, alpha=0.6, linewidth=1, label=f"{name}training batches")
        if evals:
            best = min(loss for _, loss in evals)
            label = f"{name}validation (best {best:.3f})"
            axes.plot(*zip(*evals, strict=True), **style, marker="o", markersize=4, linewidth=2, label=label)
    axes.set_xlabel(X_LABELS[x])
    axes.set_ylabel("loss (nats per token)")
    if len(folders) == 1:
        axes.set_title(f"{folders[0].name}: {describe(config)}", fontsize=10)
    tidy(axes)
    axes.legend(frameon=False)
    figure.savefig(path)


def describe(config: dict[str, Any]) -> str:
    return f"{config['n_layer']} layers x {config['n_embd']} on {config['dataset']}"
