"""DeepSpeed's universal checkpoint: whole parameters and moments, a file each, which ZeRO-1, 2 and 3 partition anew.

For a script of one's own: engine.load_checkpoint(TARGET) under "checkpoint": {"load_universal": true}. (The scripts
here partition any checkpoint while they read it.) DeepSpeed 0.19.8 gives ZeRO-3 the weight decay of the first group for
all, and one count of steps that every sub-group raises: set both again after loading.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import safe_globals

from model import GPTConfig
from training import checkpoint, files
from training.checkpoint import ABOUT
from training.errors import CheckpointError
from training.formats import fit, lazy, torch_file
from training.formats.adamw import groups, param_groups
from training.formats.options import Options
from training.formats.zero import VERSION
from training.model_state import TIED, SavedState
from training.saved_state import STAND_INS
from training.sharding import KINDS, WEIGHT

LATEST = "latest_universal"
NAMES = {kind: "fp32" if kind == WEIGHT else kind for kind in KINDS}
OVERALL = "optimizer_state.pt"
STRATEGY = "universal"


def found(folder: Path) -> Path | None:
    """The checkpoint in a folder that has one or is one."""
    latest = folder / LATEST
    folder = folder / latest.read_text().strip() if latest.is_file() else folder
    return folder if (folder / "zero" / OVERALL).is_file() else None


def read(folder: Path) -> tuple[SavedState, dict[str, Any]]:
    """One that was written here, or by DeepSpeed's ds_to_universal, which leaves out what the model is."""
    path = found(folder)
    assert path, f"{folder} is no universal checkpoint"
    if not (path / ABOUT).is_file():
        raise CheckpointError(
            f"{path} does not say what model it is of; copy there the {ABOUT} of the run it came from"
        )
    checked(path)
    about = checkpoint.read_about(path)
    pieces: dict[tuple[str, str], list[Tensor]] = {}
    shapes: dict[str, torch.Size] = {}
    wanted = fit.shapes(GPTConfig(**about["model"]))
    with safe_globals(STAND_INS):
        overall = files.read(path / "zero" / OVERALL)
    step = overall.get("optimizer_state_dict", {}).get("state", {}).get(0, {}).get("step")
    for parameter in sorted(p.parent for p in path.glob("zero/*/fp32.pt") if p.parent.name != TIED):
        for kind, name in NAMES.items():
            if not (parameter / f"{name}.pt").is_file():
                raise CheckpointError(f"{parameter / name}.pt is missing; take another checkpoint")
            held = files.read(parameter / f"{name}.pt")
            tensor = held["param"] if isinstance(held, dict) else held
            pieces[parameter.name, kind] = [tensor.flatten()]
            shape = wanted.get(parameter.name, tensor.shape)
            shapes[parameter.name] = shape if shape.numel() == tensor.numel() else tensor.shape  # ZeRO-3's are flat
        step = files.read(parameter / "step.pt") if step is None else step
    return SavedState(path, shapes, pieces, float(step or 0)), about


def checked(path: Path) -> None:
    """Raises CheckpointError where a file is another than was written: by our sums, or by those in torch's files."""
    try:
        ours = checkpoint.read_about(path).get("strategy") == STRATEGY
    except (OSError, ValueError):
        ours = True
    if ours:
        checkpoint.check(path)
        return
    for file in path.glob("zero/**/*.pt"):
        torch_file.check(file)


def write(saved: SavedState, about: dict[str, Any], target: Path, options: Options) -> list[str]:
    tag = f"step_{about['step']:06d}"
    zero = target / tag / "zero"
    step = torch.tensor(saved.step)
    for name in saved.shapes:
        (zero / name).mkdir(parents=True)
        for kind, file in NAMES.items():
            torch_file.save(zero / name / f"{file}.pt", {"param": lazy.stored(saved, name, kind)})
        torch_file.save(zero / name / "step.pt", step)
    hyper = param_groups(about["settings"], [[0], [1]], fused=True)
    overall = {"state": {0: {"step": step}}, "param_groups": hyper}
    state = {"ds_version": VERSION, "param_groups": hyper, "optimizer_state_dict": overall}
    torch_file.save(zero / OVERALL, state)
    model = {
        **{"dp_world_size": 1, "mp_world_size": 1, "global_steps": about["step"], "skipped_steps": 0},
        "param_shapes": [{name: saved.shapes[name] for name in names} for names in groups(saved)],
        "lr_scheduler": {"last_batch_iteration": int(saved.step) - 1},
        "universal_checkpoint_info": {"universal_checkpoint_version": 0.2},
    }
    for file in ("mp_rank_00", "zero_pp_rank_0_mp_rank_00"):  # stages 1 and 2 look for one, stage 3 for the other
        torch_file.save(target / tag / f"{file}_model_states.pt", model)
    sums = {str(path.relative_to(target / tag)): files.checksum(path) for path in (target / tag).rglob("*.pt")}
    about = {**about, "format": checkpoint.FORMAT, "strategy": STRATEGY, **checkpoint.listed(sums)}
    (target / tag / ABOUT).write_text(checkpoint.signed(about))
    (target / LATEST).write_text(tag)
    return []
