"""The curve as a figure: how well each strategy scales, and the least memory that it needs."""

from pathlib import Path
from typing import Any

from training.plan.choice import Option, best, by_strategy
from training.plan.report import rate

# One colour a family, darker where more is partitioned; dashed: offloaded. DDP of one rank is a single process.
STYLES = {
    "single": ("0.15", "-"),
    "ddp": ("0.15", "-"),
    "zero0": ("0.6", "-"),
    "zero1": ("#9ecae1", "-"),
    "zero2": ("#4292c6", "-"),
    "zero3": ("#08519c", "-"),
    "fsdp_grad_op": ("#fdae6b", "-"),
    "fsdp": ("#e6550d", "-"),
    "fsdp_hsdp": ("#8c2d04", "-"),
    "zero2_offload": ("#4292c6", "--"),
    "zero3_offload": ("#08519c", "--"),
    "fsdp_offload": ("#e6550d", "--"),
    "zero3_nvme": ("#08519c", ":"),
}
Lines = dict[str, list[tuple[int, float]]]


def draw(points: dict[int, list[Option]], path: Path) -> None:
    """Above, tokens/s of a GPU where the strategy fits; below, GB of a rank with the micro-batch that needs least."""
    import matplotlib.ticker  # not before it is wanted: it costs half a second

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    speeds, sizes = lines(points)
    figure, (speed, memory) = plt.subplots(2, 1, figsize=(9, 9), dpi=120, layout="constrained", sharex=True)
    for axes, found in ((speed, speeds), (memory, sizes)):
        for name in STYLES:
            if name in found:
                color, style = STYLES[name]
                axes.plot(*zip(*found[name], strict=True), color=color, linestyle=style, marker="o", markersize=3)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    wish = next(reversed(points.values()))[0].wish
    speed.set_title(title(wish), fontsize=10)
    speed.set_ylabel("tokens/s of a GPU, where it fits")
    speed.set_ylim(bottom=0)
    memory.set_ylabel("GB of a rank, smallest micro-batch")
    memory.set_yscale("log")
    memory.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    memory.yaxis.set_minor_locator(plt.NullLocator())
    for axes in (speed, memory):
        axes.yaxis.set_major_formatter(plt.FuncFormatter(lambda value, _: f"{value:,g}"))
    memory.axhline(wish.system.memory / 1e9, color="0.4", linewidth=1)
    memory.annotate(wish.system.device, (1, wish.system.memory / 1e9), va="bottom", color="0.4", fontsize=8)
    memory.set_xscale("log", base=2)
    memory.set_xticks(list(points), [f"{n:,}" for n in points])
    memory.set_xlabel("GPUs")
    legend(figure, plt, [name for name in STYLES if name in sizes])
    figure.savefig(path)
    plt.close(figure)


def lines(points: dict[int, list[Option]]) -> tuple[Lines, Lines]:
    """Of each strategy (ranks, tokens/s of a rank) where it fits, and (ranks, GB); a single process is DDP's first."""
    speeds: Lines = {}
    sizes: Lines = {}
    for ranks, found in points.items():
        for name, of_one in by_strategy(found).items():
            name = "ddp" if name == "single" else name
            if (taken := best(of_one)).fits():
                speeds.setdefault(name, []).append((ranks, taken.tokens_per_second() / ranks))
            sizes.setdefault(name, []).append((ranks, min(option.memory.total() for option in of_one) / 1e9))
    return speeds, sizes


def title(wish: Any) -> str:
    system, dtype = wish.system, str(wish.system.dtype).removeprefix("torch.")
    where = f"nodes of {system.gpus} x {system.device}, {rate(system.link)} between them, {dtype}"
    return f"{wish.shape.name}, {wish.shape.parameter_count():,} parameters: {where}"


def legend(figure: Any, plt: Any, names: list[str]) -> None:
    handles = [plt.Line2D([], [], color=STYLES[name][0], linestyle=STYLES[name][1]) for name in names]
    words = ["single, ddp" if name == "ddp" else name for name in names]
    figure.legend(handles, words, loc="outside lower center", frameon=False, fontsize=9, ncols=6)
