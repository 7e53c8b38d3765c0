"""A run folder, as train.py leaves it in one process: it resumes from there, and sample.py reads it."""

import json
from pathlib import Path
from typing import Any

from training import checkpoint
from training.checkpoint import Checkpoints
from training.errors import CheckpointError
from training.formats import adamw, lazy, torch_file
from training.formats.adamw import SETTINGS
from training.formats.options import Options
from training.model_state import SavedState
from training.saved_state import open_state
from training.saving import Saver
from training.sharding import KINDS as KINDS


def read(folder: Path) -> tuple[SavedState, dict[str, Any]]:
    """folder: of a run, whose newest checkpoint is taken, or one checkpoint; of any strategy."""
    if (folder / checkpoint.ABOUT).is_file():
        checkpoint.check(folder)
        about = checkpoint.read_about(folder)
    elif (checkpoints := Checkpoints(str(folder))).finished():
        folder, about = checkpoints.newest()
        checkpoints.verify(folder)
    else:
        raise CheckpointError(f"{folder}: its run has saved no checkpoint yet")
    config = folder.parent.parent / "config.json"
    told = json.loads(config.read_text()) if config.is_file() else {}
    return open_state(folder, about), {"settings": {key: told[key] for key in SETTINGS if key in told}, **about}


def write(saved: SavedState, about: dict[str, Any], target: Path, options: Options) -> list[str]:
    about = {**about, "strategy": "single", "world_size": 1, "dtype": "float32"}
    with Saver(Checkpoints(str(target))).writing(about, best=False) as files:
        torch_file.save(files.folder / "model.pt", {name: lazy.stored(saved, name) for name in saved.shapes})
        optimizer = adamw.state_dict(saved, about["settings"], fused=True)
        torch_file.save(files.folder / "optimizer.pt", {"optimizer": optimizer, "scaler": saved.scaler})
    return []
