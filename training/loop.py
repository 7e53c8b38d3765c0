"""The outer loop: evaluate, save, step, log. Written once; what differs between strategies is in the trainer."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from training.batches import Batches
from training.checkpoint import Checkpoints
from training.distributed import Ranks
from training.evaluation import evaluate
from training.metrics import Metrics
from training.origin import Origin
from training.train_config import TrainConfig


class Trainer(Protocol):
    """The seams of a train script: how a loss comes about, how a step is taken, which files hold the model state."""

    dtype: torch.dtype
    strategy: str

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor: ...

    def train_step(self, step: int) -> tuple[Tensor, Tensor | None, float]: ...

    def save(self, folder: Path) -> None: ...


def train(
    cfg: TrainConfig, ranks: Ranks, batches: Batches, trainer: Trainer, checkpoints: Checkpoints, origin: Origin
) -> None:
    """From origin.step to max_iters. A step's number is the number of updates made before it."""
    metrics = Metrics(cfg, ranks, batches.tokens_per_step, origin, trainer.dtype)
    about: dict[str, Any] = {"model": asdict(origin.model), "tokenizer": batches.dataset.tokenizer.describe()}
    about |= {"vocab_size": batches.dataset.vocab_size, "init_from": origin.init_from}
    about |= {"strategy": trainer.strategy, "world_size": ranks.world_size}
    best = origin.best_val_loss or math.inf
    for step in range(origin.step, cfg.max_iters + 1):
        last = step == cfg.max_iters or cfg.eval_only
        resumed = step == origin.step and origin.checkpoint is not None  # evaluated and saved before
        if cfg.eval_only or ((last or step % cfg.eval_interval == 0) and not resumed):
            with metrics.untimed():
                losses = evaluate(trainer.loss, batches, ranks, cfg.eval_iters)
                metrics.evaluation(step, losses)
                improved, best = losses["val_loss"] < best, min(best, losses["val_loss"])
                if step > origin.step and (improved or cfg.always_save_checkpoint):
                    now = {"step": step, "best_val_loss": best, **about}
                    with checkpoints.writing(now, improved) as folder:
                        trainer.save(folder)
        if last:
            break
        loss, grad_norm, lr = trainer.train_step(step)
        metrics.count_step()
        if step % cfg.log_interval == 0:
            metrics.train(step, ranks.mean(loss).item(), lr, grad_norm.item() if grad_norm is not None else None)
    metrics.close()
