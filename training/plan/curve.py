"""From 1 to 1,024 GPUs: which strategy is best, how fast it is, and what a rank holds; a table and a figure."""

import argparse
from dataclasses import replace
from pathlib import Path

from training.errors import UserError
from training.plan import request
from training.plan.choice import Option, best_of_each, options, recommended
from training.plan.figure import draw
from training.plan.report import align, cell, header, short
from training.plan.shapes import Shape
from training.plan.system import System

MOST = 1024
Points = dict[int, list[Option]]  # ranks -> every option


def run(args: argparse.Namespace, shape: Shape, system: System) -> str:
    """The table, and the figure where one is asked for. With more ranks than sequences, the global batch grows."""
    target = Path(args.curve) if args.curve else None
    if target and target.suffix != ".png":
        raise UserError(f"curve = {args.curve!r}: must end in .png")
    points = {ranks: at(args, shape, system, ranks) for ranks in (2**power for power in range(MOST.bit_length()))}
    if target:
        try:
            draw(points, target)
        except OSError as error:
            raise UserError(f"cannot write {target}: {error.strerror}") from None
    last = points[MOST][0].wish
    return "\n\n".join([header(last), table(points), *([str(target)] if target else [])])


def at(args: argparse.Namespace, shape: Shape, system: System, ranks: int) -> list[Option]:
    """On so many ranks; nodes are filled first."""
    gpus = min(ranks, system.gpus)
    if ranks % gpus:
        raise UserError(f"gpus = {system.gpus}: the curve doubles them; take a power of two")
    part = replace(system, gpus=gpus, nodes=ranks // gpus)
    own = argparse.Namespace(**{**vars(args), "global_batch": None, "shard_ranks": 0, "batch_size": 0})
    wish = request.wish(own, shape, part, strict=False)
    wanted = max(ranks, args.global_batch or wish.global_batch)
    return list(options(replace(wish, global_batch=-(-wanted // ranks) * ranks)))


def enough(args: argparse.Namespace, shape: Shape, system: System) -> Option | None:
    """The fewest nodes with which something fits, doubled up to a thousand; None where that many do not help."""
    for power in range(1, MOST.bit_length()):
        found = recommended(best_of_each(at(args, shape, system, system.ranks * 2**power)))
        if found:
            return found
    return None


def table(points: Points) -> str:
    titles = ["GPUs", "strategy", "batch", "total", "free", "step, s"]
    titles += ["tokens/s", "a GPU's", "MFU", "days", "GPU-h"]
    rows = []
    for ranks, found in points.items():
        bests = best_of_each(found)
        taken = recommended(bests)
        if not taken:
            nearest = max(bests, key=lambda option: option.spare())
            rows.append([str(ranks), "none fits", "", cell(nearest.memory.total()), cell(nearest.spare()), *[""] * 6])
            continue
        speed = taken.tokens_per_second()
        batch = f"{taken.batch} x {taken.micro_steps}" + " *" * taken.checkpointing
        row = [str(ranks), taken.case.strategy.name, batch, cell(taken.memory.total()), cell(taken.spare())]
        row += [short(taken.time.step()), f"{speed:,.0f}", f"{speed / ranks:,.0f}", f"{taken.mfu():.0%}"]
        rows.append([*row, short(taken.days()), f"{taken.gpu_hours():,.0f}"])
    width = [max(len(row[i]) for row in [titles, *rows]) for i in range(len(titles))]
    return "\n".join(
        "  ".join(align(text, title, w) for text, title, w in zip(row, titles, width, strict=True)).rstrip()
        for row in [titles, *rows]
    )
