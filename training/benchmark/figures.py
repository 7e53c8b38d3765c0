"""The figures of a benchmark: a bar or a curve a strategy, in the order of the rows."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training import figures
from training.benchmark.breakdown import PARTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, Any]
WIDTH = 5.0  # inches: readable on a phone, two beside one another on a desk
KINDS = ("parameters", "gradients", "optimizer_states", "buffers", "activations", "interpreter")  # of memory
COLOURS = dict(zip(KINDS, (figures.COLOURS[n] for n in (0, 1, 2, 3, 4, 6)), strict=True))
OF_PARTS = dict(zip(PARTS, (figures.COLOURS[n] for n in (5, 0, 3, 2, 1, 6)), strict=True))
LEAST_DIFFERENCE = 1e-9  # below the last bit of an fp32 loss: drawn there, where two losses are the same


def bars(rows: list[Row], label: str) -> tuple["Figure", "Axes"]:
    """Axes with a place a row, the first on top; a row that failed says so in its place."""
    figure = figures.new(WIDTH, 1.3 + 0.42 * len(rows))
    axes = figure.add_subplot()
    axes.set_yticks(range(len(rows)), [row["strategy"] for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel(label)
    figures.tidy(axes, "x")
    axes.tick_params(axis="y", length=0)
    for place, row in enumerate(rows):
        if row["status"] != "ok":
            axes.annotate(row["status"], (0, place), (6, 0), textcoords="offset points", va="center", style="italic")
    return figure, axes


def throughput(rows: list[Row]) -> "Figure":
    """Median tokens/s, and between which values half of the steps are."""
    figure, axes = bars(rows, "tokens/s, median; whiskers: half of the steps")
    most = max(row["tokens_per_second_quartiles"][1] for row in rows if row.get("tokens_per_second"))
    for place, row in enumerate(rows):
        if (rate := row.get("tokens_per_second")) and row["status"] == "ok":
            low, high = row["tokens_per_second_quartiles"]
            axes.barh(place, rate, 0.62, color=figures.COLOURS[0])
            axes.plot([low, high], [place, place], color="#222222", linewidth=1.2, solid_capstyle="butt")
            ends: dict[str, Any] = {"marker": "|", "markersize": 7, "color": "#222222", "linestyle": ""}
            axes.plot([low, high], [place, place], **ends)
            axes.annotate(f"{rate:,.0f}", (max(rate, high), place), (5, 0), textcoords="offset points", va="center")
    axes.set_xlim(0, most * 1.22)  # room for the numbers
    axes.xaxis.set_major_formatter("{x:,.0f}")
    return figure


def stacked(rows: list[Row], colours: dict[str, str], of: Callable[[Row], Row], label: str) -> "Figure":
    """Bars of the parts that `of` gives, with one legend above."""
    figure, axes = bars(rows, label)
    used = [name for name in colours if any(of(row).get(name) for row in rows)]
    for name in used:
        starts = [sum(of(row).get(other, 0) for other in used[: used.index(name)]) for row in rows]
        sizes = [of(row).get(name, 0) for row in rows]
        axes.barh(range(len(rows)), sizes, 0.62, starts, color=colours[name], label=name.replace("_", " "))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    figure.set_figheight(figure.get_figheight() + 0.25 * -(-len(used) // 3))
    figure.legend(loc="outside upper left", ncols=3, frameon=False, handlelength=1.2, columnspacing=1.2)
    return figure


def memory(rows: list[Row]) -> "Figure":
    """Of the rank that has most: what its peak is made of. A line where the model state ends by the formula."""
    on_cpu = any("interpreter" in row.get("memory", {}) and row["memory"]["interpreter"] for row in rows)
    measured = [{**row, "memory": {k: v / 1e6 for k, v in row.get("memory", {}).items()}} for row in rows]
    where = "resident" if on_cpu else "allocated on the GPU"
    figure = stacked(measured, COLOURS, lambda row: row["memory"], f"MB, {where}; |: model state by formula")
    for place, row in enumerate(rows):
        if row.get("expected_bytes") and not row["host_memory"]:
            edge = row["expected_bytes"] / 1e6
            figure.axes[0].plot([edge, edge], [place - 0.42, place + 0.42], color="#222222", linewidth=1.6)
        elif host := sum(row.get("host_memory", {}).values()) / 1e6:
            used = sum(measured[place]["memory"].values())
            text = f"+ {host:,.0f} in the host"
            figure.axes[0].annotate(text, (used, place), (5, 0), textcoords="offset points", va="center", fontsize=9)
    return figure


def step(rows: list[Row]) -> "Figure":
    """The parts of a step, scaled from the profiled steps to the median one."""

    def of(row: Row) -> Row:
        found = row.get("breakdown_ms", {})
        whole = sum(found.values())
        return {name: ms * row["step_ms"] / whole for name, ms in found.items()} if "step_ms" in row else {}

    return stacked(rows, OF_PARTS, of, "ms of a step (mean of the ranks)")


def losses(rows: list[Row]) -> "Figure":
    """The curves over one another, and below how far each is from the baseline's."""
    drawn = [row for row in rows if row.get("losses")]
    figure = figures.new(WIDTH, 4.4)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    base = next(row for row in drawn if row.get("verdict"))
    largest = base["tolerance"]
    for number, row in enumerate(drawn):
        steps, values = zip(*row["losses"], strict=True)
        style = figures.look(number)
        width = 1.2 * (len(drawn) - number)  # one within the other: curves that are the same are all seen
        above.plot(steps, values, color=style["color"], linewidth=width, label=row["strategy"])
        if row is not base and row.get("verdict"):
            apart = [max(abs(a - b[1]), LEAST_DIFFERENCE) for a, b in zip(values, base["losses"], strict=True)]
            below.plot(steps, apart, **style, linewidth=1.2)
            largest = max(largest, *apart)
    below.set_ylim(LEAST_DIFFERENCE / 2, largest * 10)
    below.set_yscale("log")
    below.axhline(base["tolerance"], color="#888888", linewidth=1)
    limit = f"still the same: {base['tolerance']:g}"
    below.annotate(limit, (0, base["tolerance"]), (2, 3), textcoords="offset points", fontsize=9, color="#808080")
    above.set_ylabel("loss (nats per token)")
    below.set_ylabel(f"from {base['strategy']}'s")
    below.set_xlabel("step")
    for axes in (above, below):
        figures.tidy(axes)
    legend = figure.legend(*above.get_legend_handles_labels(), loc="outside upper left", ncols=3, frameon=False)
    figure.set_figheight(figure.get_figheight() + 0.25 * -(-len(legend.get_lines()) // 3))
    for number, line in enumerate(legend.get_lines()):  # its dashes are those below
        line.set(linewidth=2, linestyle=figures.look(number)["linestyle"])
    return figure


def all_of(rows: list[Row]) -> dict[str, "Figure"]:
    """Those that there are numbers for, by name."""
    found = {"throughput": throughput(rows), "losses": losses(rows)}
    for name, of, draw in (("memory", "memory", memory), ("step", "breakdown_ms", step)):
        if any(row.get(of) for row in rows):
            found[name] = draw([row for row in rows if row.get(of) or row["status"] != "ok"])
    return found


def write(rows: list[Row], folder: Path) -> list[Path]:
    """A PNG each."""
    paths = []
    for name, figure in all_of(rows).items():
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=160)
    return paths
