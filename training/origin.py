"""Where a run begins: at fresh weights, at weights from elsewhere, or at a checkpoint of its own."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from data.dataset import Dataset
from model import GPTConfig, initial_value
from training import pretrained
from training.checkpoint import Checkpoints, read_about
from training.errors import CheckpointError
from training.model_state import SavedState
from training.train_config import TrainConfig

SHAPE = ("n_layer", "n_head", "n_embd", "block_size", "bias")


@dataclass(frozen=True)
class Origin:
    model: GPTConfig
    init_from: str = "scratch"  # what the run's very first start had, through all resumes
    weights: SavedState | None = None
    checkpoint: Path | None = None
    step: int = 0
    best_val_loss: float | None = None
    evaluated: bool = False  # at that step, before it was saved

    def value(self, name: str, shape: torch.Size, seed: int) -> Tensor:
        """A parameter's first value, whole, on the CPU."""
        return self.weights.whole(name) if self.weights else initial_value(name, shape, self.model, seed)


def find_origin(cfg: TrainConfig, checkpoints: Checkpoints, dataset: Dataset) -> Origin:
    """Raises CheckpointError, ConfigError or UserError where cfg.init_from leads nowhere."""
    whole = checkpoints.whole() if cfg.resume == "auto" else []
    if cfg.init_from == "scratch" and not whole:
        return Origin(cfg.model_config(dataset.vocab_size))
    if cfg.init_from != "resume" and not whole:
        model, weights = pretrained.start_from(cfg, dataset.vocab_size)
        return Origin(model, cfg.init_from, weights)
    folder, about = (whole[-1], read_about(whole[-1])) if whole else checkpoints.newest()
    checkpoints.verify(folder)
    saved, here = about["tokenizer"], dataset.tokenizer.describe()
    if saved != here:
        raise CheckpointError(
            f"{folder} was trained on tokens of {saved['name']!r} ({about['vocab_size']} ids), dataset = "
            f"{cfg.dataset!r} has those of {here['name']!r} ({dataset.vocab_size} ids) or another vocabulary; "
            "name the data set that the run started with"
        )
    model = GPTConfig(**about["model"])
    # a run that began with GPT-2's weights has their shape, whatever the settings say
    keys = SHAPE if about["init_from"] == "scratch" else ("block_size",)
    if unlike := [k for k in keys if getattr(cfg, k) != getattr(model, k)]:
        lines = [f"--{k}={getattr(model, k)} (not {getattr(cfg, k)})" for k in unlike]
        raise CheckpointError(f"{folder} is of another model; resume it with {', '.join(lines)}")
    model = replace(model, dropout=cfg.dropout, activation_checkpointing=cfg.activation_checkpointing)
    return Origin(
        model, about["init_from"], None, folder, about["step"], about["best_val_loss"], about.get("evaluated", True)
    )
