"""What --calibrate measured of a machine, as a file that --machine reads."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from training.errors import UserError
from training.plan.assumptions import ON_CPU, attribute, values
from training.plan.system import System

FORMAT = "nanozero machine, 2"
NUMBERS = (
    *("memory", "flops", "achievable", "memory_rate", "update_rate", "latency"),
    *("baselines", "overheads"),
)


@dataclass(frozen=True)
class Measured:
    """Rates in bytes a second, sizes in bytes, times in seconds; of a rank, while `ranks` of them work side by side."""

    device: str
    kind: str  # cuda, cpu
    ranks: int
    dtype: str
    memory: float
    flops: float  # FLOP/s of large matmuls
    achievable: float  # share of it that a block of the model reaches, forward and backward
    memory_rate: float  # a copy reads and writes
    update_rate: float  # AdamW reads and writes
    link: float  # bus bandwidth of an all-reduce; 0: one rank
    latency: float  # of a short one
    baselines: dict[str, float]  # strategy -> bytes of a process besides those by formula
    overheads: dict[str, float]  # strategy -> seconds a block and micro-step besides computing
    n_embd: int  # of the block
    block_size: int

    def system(self, about: dict[str, Any], origin: str) -> System:
        """Of gpus, nodes, link and whatever else `about` has, which goes before what was measured."""
        assumed = {attribute(name): value for name, value in values({}).items()}
        adapted = ON_CPU if self.kind == "cpu" else {}
        numbers = {name: getattr(self, name) for name in NUMBERS}
        known = {"device": self.device, "kind": self.kind, "dtype": getattr(torch, self.dtype)}
        sources = dict.fromkeys(numbers, f"measured, {origin}") | dict.fromkeys(adapted, "of CPU ranks")
        sources |= dict.fromkeys(about, "given")
        link = {"node_link": self.link or 1e12, "origin": sources}  # one rank sends nothing
        return System(**{**assumed, **numbers, **adapted, **known, **link, **about})

    def write(self, path: Path) -> None:
        path.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n")


def read(name: str) -> Measured:
    """UserError where it is no such file."""
    try:
        found = json.loads(Path(name).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"machine = {name!r}: {error.strerror}; --calibrate={name} measures and writes it") from None
    except ValueError:
        found = None
    if not isinstance(found, dict) or found.pop("format", None) != FORMAT:
        raise UserError(f"machine = {name!r}: is not what --calibrate writes; measure it, --calibrate={name}")
    if problem := wrong(found):
        raise UserError(f"machine = {name!r}: {problem}; measure it anew, --calibrate={name}")
    return Measured(**found)


def wrong(found: dict) -> str:
    """The first thing that is wrong with it; nothing where all is well."""
    known = {f.name: f.type for f in fields(Measured)}
    for name in known.keys() ^ found.keys():
        return f"{name} is {'missing' if name in known else 'unknown'}"
    for name, kind in known.items():
        value = found[name]
        numbers = list(value.values()) if isinstance(value, dict) else [value]
        if kind is str and not isinstance(value, str):
            return f"{name} = {value!r}: must be text"
        if (kind in (int, float) or isinstance(value, dict)) and not all(number(n) for n in numbers):
            return f"{name} = {value!r}: must be a number from 0 on"
        if "dict" in str(kind) and not isinstance(value, dict):
            return f"{name} = {value!r}: must be an object"
        if name in ("memory", "flops", "achievable", "memory_rate", "update_rate") and not value:
            return f"{name} = 0: must be above 0"
    return ""


def number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e30
