"""What a prediction assumes: each number with its source, and an option that replaces it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from training.errors import UserError
from training.units import amount, rate, share, size


@dataclass(frozen=True)
class Assumption:
    default: str
    read: Callable[[str], float]
    meaning: str
    source: str


ASSUMPTIONS = {
    "achievable": Assumption(
        "0.5",
        share,
        "share of the device's matmul peak that a step's computing reaches",
        "published MFU lies between 0.30 (GPT-2 124M on A100s, nanoGPT's 562 ms for 491,520 tokens) and 0.58 (7B on an "
        "H200, KempnerForge)",
    ),
    "link-share": Assumption("0.8", share, "share of a link's nominal rate that collectives reach", "assumed"),
    "latency": Assumption("2e-5", amount, "seconds that a collective takes besides its bytes", "assumed"),
    "overlap": Assumption(
        "0.8",
        share,
        "share of the computing beside it that communication can hide behind, where it runs beside computing at all",
        "assumed for GPUs; on CPU ranks DDP's 1 Gbit/s took 37 ms of 104 from a step of 218 (results/zero_links): 0.5 "
        "of backward; ZeRO-1 and 2 hide nothing, ZeRO-3 all that a step has room for (results/plan_check/links.md)",
    ),
    "fragmentation": Assumption(
        "0.1", amount, "allowance for fragments, a share of what comes and goes within a step", "assumed"
    ),
    "baseline": Assumption("1.5GB", size, "what a process holds of its device besides: CUDA, NCCL", "assumed"),
    "host-bandwidth": Assumption(
        "100GB", rate, "of a node's memory, for the optimizer of what is offloaded", "assumed"
    ),
    "host-link": Assumption("25GB", rate, "between a GPU and the host's memory, each way", "PCIe 4 x16, less a fifth"),
    "nvme-bandwidth": Assumption("3GB", rate, "of a node's NVMe disks, reading and writing alike", "assumed"),
}
ON_CPU = {"overlap": 0.5, "fragmentation": 0.0, "link_share": 1.0}  # in place of the defaults, measured or not


def values(given: dict[str, str]) -> dict[str, float]:
    """name -> number, of what the command line gives and of the defaults."""
    found = {}
    for name, known in ASSUMPTIONS.items():
        try:
            found[name] = known.read(given.get(name, known.default))
        except UserError as error:
            raise UserError(f"{name} = {error}") from None
    return found


def attribute(name: str) -> str:
    return name.replace("-", "_")


def listing(hardware: Any) -> list[str]:
    """A line for each, with the number that was taken."""
    lines = []
    for name, known in ASSUMPTIONS.items():
        taken = getattr(hardware, attribute(name))
        origin = hardware.origin.get(attribute(name), known.source)
        lines.append(f"--{name}={taken:.4g}: {known.meaning} ({origin})")
    return lines
