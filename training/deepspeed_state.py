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


@contextmanager
def writing(engine: Any, writer: CheckpointWriter) -> Iterator[None]:
    """Wrap engine.save_checkpoint, so that `writer` writes the files: with checksums, and maybe in the background.

    Raises its OSError only at the end, because every rank must pass the barriers in save_checkpoint.
    """
    errors: list[OSError] = []

    def save(state_dict: Any, path: str) -> None:
        try:
            writer.write(str(Path(path).relative_to(writer.folder)), state_dict)
        except OSError as error:
            errors.append(error)

    engine.checkpoint_engine.save = save
    engine._copy_recovery_script = lambda folder: None  # else zero_to_fp32.py and zero_to_torch.py are copied there
    yield
    rank = torch.distributed.get_rank()
    writer.add((writer.folder / "offloaded_tensors" / f"rank{rank:02d}").glob("*"))  # copied from NVMe by DeepSpeed
    if errors:
        raise errors[0]


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
