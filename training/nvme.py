"""A run's own folder on the NVMe disk of a node.

DeepSpeed swaps into one folder, whichever run it is, leaves there what it wrote, and copies all that it finds there
into every checkpoint: two runs at a time would read each other's optimizer states, and one after the other grow. Here
each run has a folder of its own, empty when it starts and gone when it ends.
"""

import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from training.distributed import Ranks


def blocks(config: dict[str, Any]) -> list[dict[str, Any]]:
    """Those of DeepSpeed's JSON that name a disk."""
    zero = config.get("zero_optimization") or {}
    found = [zero.get(f"offload_{what}") or {} for what in ("optimizer", "param")]
    return [block for block in found if block.get("device") == "nvme"]


def take_disk(config: dict[str, Any], disk: str) -> None:
    """disk: in place of the JSON's; empty: that."""
    for block in blocks(config):
        block["nvme_path"] = disk or block.get("nvme_path")


def take_own(config: dict[str, Any], out_dir: str) -> None:
    """The run's folder on the disk, in place of the disk."""
    for block in blocks(config):
        block["nvme_path"] = str(own(block["nvme_path"], out_dir))


def own(disk: str, out_dir: str) -> Path:
    """The name tells whose it is, the number runs of the same name apart."""
    place = Path(out_dir).absolute()
    return Path(disk) / f"{place.name}-{zlib.crc32(str(place).encode()):08x}"


@contextmanager
def own_folder(config: dict[str, Any], disk: str, out_dir: str, ranks: Ranks) -> Iterator[None]:
    """Without what a killed run has left there, and with nothing left behind. config: as the JSON has it."""
    folders = {own(path, out_dir) for block in blocks(config) if (path := disk or block.get("nvme_path"))}
    with ranks.together():
        clear(folders, ranks)
    try:
        yield
    finally:
        clear(folders, ranks)


def clear(folders: set[Path], ranks: Ranks) -> None:
    for path in folders if ranks.local_rank == 0 else ():
        shutil.rmtree(path, ignore_errors=True)
