"""Initial state of a run: random weights, pretrained weights, or a checkpoint."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.dataset import Dataset
from model import GPTConfig, initial_value
from training.checkpoint import Checkpoints
from training.config import TrainConfig


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
            from training.model_state import init_from_checkpoint  # new runs do without it

            return init_from_checkpoint(cfg, *checkpoint, dataset)
        if cfg.init_from == "scratch":
            return InitState(cfg.model_config(dataset.vocab_size))
        from training import pretrained  # most runs do not need it

        model, weights = pretrained.start_from(cfg, dataset.vocab_size)
        return InitState(model, cfg.init_from, weights)
