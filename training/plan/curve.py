"""From 1 to 1,024 GPUs: which strategy is best, how fast it is, and what a rank holds; a table and a figure."""

import argparse
from dataclasses import replace
from pathlib import Path

from training.errors import UserError
from training.plan import request
from training.plan.choice import Option, best_of_each, options, recommended
from training.plan.report import align, cell, header, short
from training.plan.shapes import Shape
from training.plan.system import System

MOST = 1024
Points = dict[int, list[Option]]  # ranks -> the best of each strategy


def run(args: argparse.Namespace, shape: Shape, system: System) -> str:
    """The table; the figure, where one is asked for. The global batch grows where there are more ranks than sequences."""
    target = Path(args.curve) if args.curve else None
    if target and target.suffix != ".png":
        raise UserError(f"curve = {args.curve!r}: must end in .png")
    points = {ranks: at(args, shape, system, ranks) for ranks in (2**power for power in range(MOST.bit_length()))}
    if target:
        try:
            draw(points, target)
        except OSError as error:
            raise UserError(f"cannot write {target}: {error.strerror}") from None
    last = next(iter(points[MOST])).wish
    return "\n\n".join([header(last), table(points), *([str(target)] if target else [])])


def at(args: argparse.Namespace, shape: Shape, system: System, ranks: int) -> list[Option]:
    """Nodes are filled first."""
    gpus = min(ranks, system.gpus)
    if ranks % gpus:
        raise UserError(f"gpus = {system.gpus}: the curve doubles them; take a power of two")
    part = replace(system, gpus=gpus, nodes=ranks // gpus)
    own = argparse.Namespace(**{**vars(args), "global_batch": None, "shard_ranks": 0, "strategies": None})
    wish = request.wish(own, shape, part)
    wanted = args.global_batch or wish.global_batch
    wish = replace(wish, global_batch=-(-max(ranks, wanted) // ranks) * ranks, batch_size=0)
    if args.strategies:
        names = args.strategies.split(",")
        kept = tuple(s for s in request.strategies.named(args.strategies) if s in wish.strategies)
        wish = replace(wish, strategies=kept or wish.strategies[:1])
        assert names, "an empty list has no name"
    return best_of_each(list(options(wish)))


def table(points: Points) -> str:
    titles = (
        "GPUs",
        "strategy",
        "batch",
        "total",
        "free",
        "step, s",
        "tokens/s",
        "a GPU's",
        "MFU",
        "days",
        "GPU-hours",
    )
    rows = []
    for ranks, bests in points.items():
        taken = recommended(bests)
        if not taken:
            nearest = max(bests, key=lambda option: option.spare())
            rows.append([str(ranks), "none fits", "", cell(nearest.memory.total()), cell(nearest.spare()), *[""] * 6])
            continue
        speed = taken.tokens_per_second()
        batch = f"{taken.batch} x {taken.micro_steps}" + " recomputed" * taken.checkpointing
        row = [str(ranks), taken.case.strategy.name, batch, cell(taken.memory.total()), cell(taken.spare())]
        row += [short(taken.time.step()), f"{speed:,.0f}", f"{speed / ranks:,.0f}", f"{taken.mfu():.0%}"]
        rows.append([*row, short(taken.days()), f"{taken.gpu_hours():,.0f}"])
    width = [max(len(row[i]) for row in [list(titles), *rows]) for i in range(len(titles))]
    return "\n".join(
        "  ".join(align(text, title, w) for text, title, w in zip(row, titles, width, strict=True)).rstrip()
        for row in [list(titles), *rows]
    )


def draw(points: Points, path: Path) -> None:
    """Above tokens/s, below the memory of a rank: a line a strategy, hollow where it does not fit."""
    import matplotlib  # not before it is wanted: it costs half a second

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (speed, memory) = plt.subplots(2, 1, figsize=(9, 9), dpi=120, layout="constrained", sharex=True)
    names = list(dict.fromkeys(option.case.strategy.name for bests in points.values() for option in bests))
    for number, name in enumerate(names):
        color = plt.get_cmap("tab20")(number % 20)
        found = [(n, o) for n, bests in points.items() for o in bests if o.case.strategy.name == name]
        fits = [(n, o) for n, o in found if o.fits()]
        if fits:
            ranks, taken = zip(*fits, strict=True)
            speed.plot(ranks, [o.tokens_per_second() for o in taken], color=color, marker="o", markersize=4, label=name)
        memory.plot(*zip(*((n, o.memory.total() / 1e9) for n, o in found), strict=True), color=color, label=name)
    wish = points[MOST][0].wish
    ideal = max(o.tokens_per_second() / n for n, bests in points.items() for o in bests if o.fits() or n == MOST)
    speed.plot(list(points), [ideal * n for n in points], color="0.6", linestyle=":", label="linear")
    memory.axhline(wish.system.memory / 1e9, color="0.3", linestyle="--", label=f"a {wish.system.device}")
    for axes, label in ((speed, "tokens/s, where it fits"), (memory, "GB of a rank")):
        axes.set_ylabel(label)
        axes.set_yscale("log")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    memory.set_xscale("log", base=2)
    memory.set_xticks(list(points), [f"{n:,}" for n in points])
    memory.set_xlabel("GPUs")
    speed.legend(frameon=False, fontsize=8, ncols=2)
    speed.set_title(header(wish).splitlines()[0].replace("; ", "\n", 1), fontsize=10)
    figure.savefig(path)
    plt.close(figure)
