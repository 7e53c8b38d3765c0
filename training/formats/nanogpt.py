"""nanoGPT's ckpt.pt. It names parameters as we do, and its optimizer counts them as ours: first those that decay."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from data.dataset import HERE
from model import GPTConfig
from training import files
from training.errors import CheckpointError
from training.formats import lazy, torch_file
from training.formats.adamw import SETTINGS, state_dict
from training.formats.options import Options
from training.model_state import TIED, SavedState
from training.saved_state import of_whole
from training.sharding import KINDS as KINDS

FILE = "ckpt.pt"
MODEL_ARGS = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
PREFIXES = ("_orig_mod.", "module.")  # of compiled models, and of those in DDP


def read(path: Path) -> tuple[SavedState, dict[str, Any]]:
    """path: the file. Raises CheckpointError where it is something else, or asks for code to be run."""
    torch_file.check(path)
    state = files.read(path)
    if not isinstance(state, dict) or not {"model", "model_args"} <= state.keys():
        held = ", ".join(map(repr, list(state)[:5])) if isinstance(state, dict) else type(state).__name__
        raise CheckpointError(f"{path} holds {held}; nanoGPT's {FILE} has 'model', 'model_args' and 'optimizer'")
    weights = {}
    for name, weight in state["model"].items():
        while name.startswith(PREFIXES):
            name = name.partition(".")[2]
        if name != TIED and not name.endswith(".attn.bias"):  # the mask of attention without flash
            weights[name] = weight
    config, states = state.get("config") or {}, (state.get("optimizer") or {}).get("state", {})
    best = state.get("best_val_loss")
    try:
        model = GPTConfig(**{key: state["model_args"][key] for key in MODEL_ARGS if key in state["model_args"]})
    except TypeError as error:
        raise CheckpointError(f"{path}: {error}") from None
    about = {
        **{"model": asdict(model), "init_from": str(path), "evaluated": True, "step": int(state.get("iter_num", 0))},
        "best_val_loss": None if best is None else float(best),
        "settings": {key: config[key] for key in SETTINGS if key in config},
    }
    return of_whole(path, weights, states, {}), about


def dataset(about: dict[str, Any]) -> Path | None:
    """The data set that it was trained on, where that lies here under the same name."""
    name = about.get("settings", {}).get("dataset", "")
    return HERE / name if name and (HERE / name / "train.bin").is_file() else None


def file(target: Path) -> Path:
    """TARGET names the file, or the out_dir in which nanoGPT looks for it."""
    return target if target.suffix == ".pt" else target / FILE


def write(saved: SavedState, about: dict[str, Any], target: Path, options: Options) -> list[str]:
    model = about["model"]
    weights = {name: lazy.stored(saved, name) for name in saved.shapes}
    settings = about.get("settings", {})
    state = {
        "model": {**weights, TIED: weights["transformer.wte.weight"]},
        "optimizer": state_dict(saved, settings, fused=None),
        "model_args": {key: model[key] for key in MODEL_ARGS},
        "iter_num": about["step"],
        "best_val_loss": 1e9 if about["best_val_loss"] is None else about["best_val_loss"],  # where nanoGPT begins
        "config": settings,
    }
    file(target).parent.mkdir(exist_ok=True)
    torch_file.save(file(target), state)
    if model["gelu"] == "none":
        return []
    return ["these weights are of a GELU by tanh; nanoGPT computes the exact one: its loss is a little off"]
