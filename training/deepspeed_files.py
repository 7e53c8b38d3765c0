"""DeepSpeed's checkpoint files, read and written as ours are."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from training import files
from training.saved_state import STAND_INS
from training.saving import Files


class DeepSpeedFiles:
    """Takes the place of reading and writing in an engine, whose own runs any code that a file holds."""

    def __init__(self, engine: Any):
        for _, path in STAND_INS:
            module, name = path.rsplit(".", 1)
            torch.serialization.add_safe_globals([getattr(import_module(module), name)])
        engine.checkpoint_engine.save, engine.checkpoint_engine.load = self.save, self.load
        self.files: Files | None = None
        self.failed: OSError | None = None

    @contextmanager
    def into(self, checkpoint: Files) -> Iterator[None]:
        """Around engine.save_checkpoint. An error of the disk inside it would leave the other ranks in its barriers.

        So that is kept, and raised when all ranks are out of it.
        """
        self.files, self.failed = checkpoint, None
        yield
        swapped = checkpoint.folder / "offloaded_tensors" / f"rank{torch.distributed.get_rank():02d}"
        checkpoint.add(swapped.glob("*"))  # what DeepSpeed copied from NVMe
        if self.failed:
            raise self.failed

    def save(self, state_dict: Any, path: str) -> None:
        assert self.files, f"{path} is written outside of `into`"
        try:
            self.files.write(str(Path(path).relative_to(self.files.folder)), state_dict)
        except OSError as error:
            self.failed = error

    def load(self, path: str, map_location: Any = None) -> Any:
        return files.read(Path(path))
