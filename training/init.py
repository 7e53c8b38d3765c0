"""Initial state of a run: random weights, pretrained weights, or a checkpoint."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.dataset import Dataset
from model import GPTConfig, initial_value
from training.checkpoint import Checkpoints
from training.config import TrainConfig
from training.errors import CheckpointError


@dataclass(frozen=True)
class InitState:
    model: GPTConfig
    init_from: str = "scratch"  # that of the run's first start, through all resumes
    weights: Any = None  # a SavedState, whose module is imported only where it is needed
    checkpoint: Path | None = None
    step: int = 0
    best_val_loss: float | None = None
    evaluated: bool = False  # at that step, before it was saved

    def value(self, name: str, shape: torch.Size, seed: int) -> Tensor:
        """A parameter's initial value: full, fp32, on the CPU."""
        return self.weights.whole(name) if self.weights else initial_value(name, shape, self.model, seed)


def find_init_state(cfg: TrainConfig, checkpoints: Checkpoints, dataset: Dataset) -> InitState:
    """A collective. Raises UserError on all ranks if cfg.init_from does not lead to an initial state."""
    checkpoint = None
    if cfg.init_from == "resume":
        checkpoint = checkpoints.newest(fall_back=cfg.resume == "auto")
    elif cfg.resume == "auto":
        checkpoint = checkpoints.usable(fall_back=True)
    with checkpoints.ranks.together():
        if checkpoint:
            return from_checkpoint(cfg, *checkpoint, dataset)
        if cfg.init_from == "scratch":
            return InitState(cfg.model_config(dataset.vocab_size))
        from training import pretrained  # most runs do not need it

        model, weights = pretrained.start_from(cfg, dataset.vocab_size)
        return InitState(model, cfg.init_from, weights)


def from_checkpoint(cfg: TrainConfig, folder: Path, metadata: dict[str, Any], dataset: Dataset) -> InitState:
    """Raises CheckpointError where the checkpoint does not fit the data set or the settings."""
    saved, current, ids = metadata["tokenizer"], dataset.tokenizer.describe(), metadata["vocab_size"]
    if saved != current:
        raise CheckpointError(
            f"{folder} was trained with tokenizer {saved['name']!r} ({ids} ids), which is not that of "
            f"dataset = {cfg.dataset!r} ({current['name']!r}, {dataset.vocab_size} ids); use the run's own data set"
        )
    if (optimizer := metadata.get("optimizer", cfg.optimizer)) != cfg.optimizer:
        rule = f"holds the state of {optimizer}, but optimizer = {cfg.optimizer!r}"
        raise CheckpointError(f"{folder} {rule}; resume with --optimizer={optimizer}")
    model = GPTConfig(**metadata["model"])
    own: dict[str, Any] = {"dropout": cfg.dropout, "activation_checkpointing": cfg.activation_checkpointing}
    # a run that started from pretrained weights has their shape, whatever the settings say
    wanted, keys = cfg.model_config(dataset.vocab_size), ["block_size"]
    if metadata["init_from"] == "scratch":
        keys = [k for k in asdict(model).keys() & vars(cfg).keys() if k not in own]
    if different := [k for k in sorted(keys) if getattr(wanted, k) != getattr(model, k)]:
        fixes = [f"--{k}={getattr(model, k)} (not {getattr(wanted, k)})" for k in different]
        raise CheckpointError(f"{folder} is of another model; resume it with {', '.join(fixes)}")
    kept: dict[str, Any] = {key: metadata[key] for key in ("init_from", "step", "best_val_loss")}
    evaluated = metadata.get("evaluated", True)
    return InitState(model=replace(model, **own), checkpoint=folder, evaluated=evaluated, **kept)
