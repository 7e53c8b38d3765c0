"""DeepSpeed's checkpoint files, read and written as ours are."""

from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from training import checkpoint
from training.saved_state import STAND_INS


class DeepSpeedFiles:
    """Takes the place of reading and writing in an engine, whose own runs any code that a file holds.

    An error of the disk inside engine.save_checkpoint would leave the other ranks in its barriers: it is kept, and
    raised by `check` when all ranks are out of it.
    """

    def __init__(self, engine: Any):
        for _, path in STAND_INS:
            module, name = path.rsplit(".", 1)
            torch.serialization.add_safe_globals([getattr(import_module(module), name)])
        engine.checkpoint_engine.save, engine.checkpoint_engine.load = self.save, self.load
        self.failed: OSError | None = None

    def save(self, state_dict: Any, path: str) -> None:
        try:
            checkpoint.write(Path(path), state_dict)
        except OSError as error:
            self.failed = error

    def load(self, path: str, map_location: Any = None) -> Any:
        return checkpoint.read(Path(path))

    def check(self) -> None:
        error, self.failed = self.failed, None
        if error:
            raise error
