"""What plan.py prints: a line a strategy, the one to take and why, the lines to paste."""

import json
import math
from dataclasses import asdict
from typing import Any

from training.plan import lines
from training.plan.assumptions import listing
from training.plan.choice import Option, Wish, reason
from training.units import gigabytes

GREEN, RED, GREY = "32", "31", "90"


def header(wish: Wish) -> str:
    system, shape = wish.system, wish.shape
    dtype = str(system.dtype).removeprefix("torch.")
    where = f"{system.ranks} x {system.device}"
    if system.nodes > 1:
        where = f"{system.nodes} nodes of {system.gpus} x {system.device}, {rate(system.link)} between them"
    return (
        f"{shape.name}: {shape.parameter_count():,} parameters; {where}, {gigabytes(system.memory)} each, {dtype}\n"
        f"a step: {wish.global_batch:,} sequences of {shape.block_size:,} = {wish.tokens_per_step:,} tokens; "
        f"the run: {wish.tokens:.3g} tokens"
    )


def rate(bytes_per_second: float) -> str:
    return f"{8e-9 * bytes_per_second:,.4g} Gbit/s"


def columns(options: list[Option]) -> dict[str, list[str]]:
    """Title -> a cell of each option. Sizes in GB of a rank; host and NVMe of a node."""
    found = {
        "strategy": [o.case.strategy.name for o in options],
        "batch": [f"{o.batch} x {o.micro_steps}{' *' * o.checkpointing}" for o in options],
        "state": [cell(o.memory.model_state()) for o in options],
        "activ.": [cell(o.memory.activations) for o in options],
        "buffers": [cell(o.memory.gathered + o.memory.buffers) for o in options],
        "other": [cell(o.memory.fragmentation + o.memory.baseline) for o in options],
        "total": [cell(o.memory.total()) for o in options],
        "free": [cell(o.spare()) for o in options],
        "host": [cell(o.memory.host) if o.memory.host else "" for o in options],
        "NVMe": [cell(o.memory.nvme) if o.memory.nvme else "" for o in options],
        "sent": [short(o.time.sent / 1e9) for o in options],
        "step, s": [short(o.time.step()) for o in options],
        "tokens/s": [f"{o.tokens_per_second():,.0f}" for o in options],
        "MFU": [f"{o.mfu():.0%}" for o in options],
        "days": [short(o.days()) for o in options],
        "GPU-h": [f"{o.gpu_hours():,.0f}" for o in options],
    }
    return {title: cells for title, cells in found.items() if any(cells)}


def cell(size: float) -> str:
    if not size:
        return "0"
    return f"{size / 1e9:,.{1 if abs(size) >= 1e9 else 2 if abs(size) >= 1e7 else 4}f}"


def short(value: float) -> str:
    """Three digits."""
    return f"{value:,.{max(0, 2 - math.floor(math.log10(value)))}f}" if value else "0"


def table(options: list[Option], taken: Option | None, colour: bool) -> str:
    found = columns(options)
    width = {title: max(len(title), *map(len, cells)) for title, cells in found.items()}
    rows = ["  ".join(align(title, title, width[title]) for title in found)]
    for number, option in enumerate(options):
        row = "  ".join(align(cells[number], title, width[title]) for title, cells in found.items()).rstrip()
        shade = GREEN if option is taken else "" if option.fits() else RED
        rows.append(f"\033[{shade}m{row}\033[0m" if colour and shade else row)
    return "\n".join(rows)


def align(text: str, title: str, width: int) -> str:
    return text.ljust(width) if title in ("strategy", "batch") else text.rjust(width)


def lacking(bests: list[Option], enough: Option | None) -> str:
    """enough: the fewest GPUs with which something fits."""
    nearest = max(bests, key=lambda option: option.spare())
    words = f"nothing fits: {nearest.case.strategy.name} comes nearest, and lacks {gigabytes(-nearest.spare())} a rank"
    if enough is None:
        return f"{words}; take larger GPUs, or shorter sequences: more of these do not help"
    return f"{words}; take {enough.wish.system.ranks:,} GPUs ({enough.case.strategy.name} fits), or larger ones"


def advice(taken: Option, bests: list[Option]) -> str:
    note = ["model.py is a GPT: of this shape only strategy and batch hold"] if taken.wish.shape.hidden else []
    return "\n".join(
        [
            f"Take {taken.case.strategy.name}: {reason(taken, bests)}.",
            "",
            f"# {lines.CONFIG}",
            *(f"# {line}" for line in note),
            *lines.config(taken),
            "",
            lines.command(taken),
        ]
    )


FOOTER = """\
GB of a rank: model state, activations, gathered weights and buffers, other (fragments, CUDA and NCCL), sent in a step;
host and NVMe of a node. batch: sequences x micro-steps of a rank, * with activation checkpointing."""


def text(wish: Wish, shown: list[Option], bests: list[Option], taken: Option | None, colour: bool) -> str:
    system = wish.system
    assumed = ", ".join(
        [
            f"{system.achievable:.2g} of the matmul peak",
            f"{system.link_share:.2g} of the links",
            f"{system.overlap:.2g} of computing hides communication",
        ]
    )
    footer = f"{FOOTER}\nBy {assumed}: --explain says why; --calibrate measures."
    return "\n\n".join([header(wish), table(shown, taken, colour), footer, *([advice(taken, bests)] if taken else [])])


def as_json(wish: Wish, options: list[Option], taken: Option | None, bests: list[Option]) -> str:
    """Sizes in bytes, times in seconds, rates in bytes a second."""
    system = {**asdict(wish.system), "dtype": str(wish.system.dtype).removeprefix("torch."), "ranks": wish.system.ranks}
    model = {**asdict(wish.shape), "parameters": wish.shape.parameter_count()}
    found: dict[str, Any] = {"model": model, "system": system, "assumptions": listing(wish.system)}
    found |= {"global_batch": wish.global_batch, "tokens_per_step": wish.tokens_per_step, "tokens": wish.tokens}
    found["options"] = [row(option) for option in options]
    found["recommended"] = None
    if taken:
        about = {"reason": reason(taken, bests), "config": lines.config(taken), "command": lines.command(taken)}
        found["recommended"] = {**row(taken), **about}
    return json.dumps(found, indent=1)


def row(option: Option) -> dict[str, Any]:
    about = {"strategy": option.case.strategy.name, "batch_size": option.batch, "micro_steps": option.micro_steps}
    about |= {"gradient_accumulation_steps": option.accumulation, "activation_checkpointing": option.checkpointing}
    memory = {**asdict(option.memory), "total": option.memory.total(), "spare": option.spare(), "fits": option.fits()}
    time = {**asdict(option.time), "step": option.time.step(), "tokens_per_second": option.tokens_per_second()}
    time |= {"mfu": option.mfu(), "days": option.days(), "gpu_hours": option.gpu_hours()}
    return {**about, "memory": memory, "time": time}
