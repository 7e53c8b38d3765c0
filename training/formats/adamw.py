"""What torch's AdamW saves of itself, for a model state that no optimizer holds."""

from collections.abc import Iterable
from typing import Any

import torch

from training.formats import lazy
from training.model_state import SavedState
from training.sharding import MOMENTS
from training.train_config import TrainConfig

SETTINGS = ("dataset", "learning_rate", "weight_decay", "beta1", "beta2")  # of a run: what its checkpoint does not say
# torch 2.11 to 2.13, and bias_correction for DeepSpeed's FusedAdam
REST = {
    **dict.fromkeys(("amsgrad", "maximize", "capturable", "differentiable"), False),
    **{"eps": 1e-8, "foreach": None, "decoupled_weight_decay": True, "bias_correction": True},
}


def groups(saved: SavedState) -> tuple[list[str], list[str]]:
    """The names of its two groups, in its order: those that decay, and those that do not (training/optim.py)."""
    decay = [name for name, shape in saved.shapes.items() if len(shape) >= 2]
    return decay, [name for name, shape in saved.shapes.items() if len(shape) < 2]


def param_groups(settings: dict[str, Any], numbers: Iterable[list[int]], fused: bool | None) -> list[dict[str, Any]]:
    """settings: of the run, where they are known; else train.py's defaults. numbers: of what each group holds."""
    chosen = {key: settings.get(key, getattr(TrainConfig, key)) for key in SETTINGS}
    common = {"lr": chosen["learning_rate"], "betas": (chosen["beta1"], chosen["beta2"]), **REST, "fused": fused}
    decays = (chosen["weight_decay"], 0.0)
    return [{"weight_decay": d, **common, "params": n} for d, n in zip(decays, numbers, strict=True)]


def state_dict(saved: SavedState, settings: dict[str, Any], fused: bool | None) -> dict[str, Any]:
    """Of an AdamW whose parameters are whole."""
    decay, rest = groups(saved)
    state = {
        number: {"step": torch.tensor(saved.step), **{kind: lazy.stored(saved, name, kind) for kind in MOMENTS}}
        for number, name in enumerate([*decay, *rest])
    }
    numbers = [list(state)[: len(decay)], list(state)[len(decay) :]]
    return {"state": state, "param_groups": param_groups(settings, numbers, fused)}
