"""What a DeepSpeed engine leaves on disk: checkpoint files and NVMe swap folders."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from training.checkpoint import CheckpointWriter
from training.deepspeed_config import Json, nvme_blocks
from training.distributed import Ranks


class CheckpointFiles:
    """Writes an engine's files in its place: with checksums, and in the background if the run does so."""

    def __init__(self, engine: Any):
        engine.checkpoint_engine.save = self.save
        self.writer: CheckpointWriter | None = None
        self.error: OSError | None = None

    @contextmanager
    def writing(self, writer: CheckpointWriter) -> Iterator[None]:
        """Wrap engine.save_checkpoint, whose barriers must be passed by every rank: raises OSError only after it."""
        self.writer, self.error = writer, None
        yield
        rank = torch.distributed.get_rank()
        writer.add((writer.folder / "offloaded_tensors" / f"rank{rank:02d}").glob("*"))  # copied from NVMe by DeepSpeed
        if self.error:
            raise self.error

    def save(self, state_dict: Any, path: str) -> None:
        assert self.writer, f"{path} is written outside of `writing`"
        try:
            self.writer.write(str(Path(path).relative_to(self.writer.folder)), state_dict)
        except OSError as error:
            self.error = error


def nvme_sub_groups(engine: Any) -> list[tuple[str, int]]:
    """(name of its swap files, elements on this rank) for each sub-group of an optimizer on NVMe; else []."""
    if not engine.zero_nvme_offload_optimizer():
        return []
    names = [flat.ds_id for flat in engine.optimizer.fp32_partitioned_groups_flat]
    return list(zip(names, engine.optimizer.fp16_partitioned_groups_flat_numel, strict=True))


@contextmanager
def own_swap_folders(config: Json, ranks: Ranks) -> Iterator[None]:
    """Empty this run's swap folders on NVMe at the start, and remove them at the end; config: resolved.

    DeepSpeed swaps into one folder whichever run it is, leaves its files there, and copies all files that it finds
    there into every checkpoint: two runs at a time would read each other's optimizer states.
    """
    folders = {block["nvme_path"] for block in nvme_blocks(config) if ranks.local_rank == 0}
    with ranks.together():
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
    try:
        yield
    finally:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
