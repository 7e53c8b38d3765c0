"""The outer loop: evaluate, save, step, log. Written once; what differs between strategies is in the trainer."""

import math
from dataclasses import asdict
from typing import Any, Protocol

import torch
from torch import Tensor

from training.batches import Batches
from training.checkpoint import Checkpoints
from training.distributed import Ranks
from training.evaluation import evaluate
from training.metrics import Metrics
from training.origin import Origin
from training.pulse import Pulse
from training.saving import Files, Saver
from training.train_config import TrainConfig


class Trainer(Protocol):
    """The seams of a train script: how a loss comes about, how a step is taken, which files hold the model state."""

    dtype: torch.dtype
    strategy: str

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor: ...

    def train_step(self, step: int) -> tuple[Tensor, Tensor | None, float]: ...

    def save(self, files: Files) -> None: ...


def train(
    cfg: TrainConfig, ranks: Ranks, batches: Batches, trainer: Trainer, checkpoints: Checkpoints, origin: Origin
) -> None:
    """From origin.step to max_iters, or to where it is asked to stop: raises Stopped then, on all ranks.

    A benchmark goes to cfg.steps. A step's number is the number of updates made before it.
    """
    metrics = Metrics(cfg, ranks, batches, origin, trainer.dtype)
    pulse = Pulse(cfg, ranks, checkpoints, trainer.dtype)
    saver = Saver(checkpoints, ranks, cfg.async_save)
    about = describe(ranks, batches, trainer, origin)
    best, evaluated = origin.best_val_loss or math.inf, origin.evaluated
    end = cfg.steps if cfg.benchmark else cfg.max_iters
    saved = origin.step - (not evaluated and origin.step > 0)  # the newest checkpoint's step; 0 needs none
    for step in range(origin.step, end + 1):
        last, improved = step == end or cfg.eval_only, False
        if cfg.eval_only or ((last or step % cfg.eval_interval == 0) and not (evaluated or cfg.benchmark)):
            with metrics.untimed():
                losses = evaluate(trainer.loss, batches, ranks, cfg.eval_iters, pulse.exchange)
            if losses:  # else it was asked to stop meanwhile
                metrics.evaluation(step, losses)
                evaluated, improved, best = True, losses["val_loss"] < best, min(best, losses["val_loss"])
        wanted = improved or pulse.stop or pulse.save or (evaluated and cfg.always_save_checkpoint)
        if wanted and step > saved and not (cfg.eval_only or cfg.benchmark):
            now = {"step": step, "best_val_loss": best, "evaluated": evaluated}
            with metrics.saving(step), pulse.saving(), saver.writing({**now, **about}, improved) as files:
                trainer.save(files)
            saved = step
        if last or pulse.stop:
            break
        loss, grad_norm, lr = trainer.train_step(step)
        evaluated = False
        pulse.step_done(step, loss, grad_norm)
        metrics.count_step()
        if cfg.benchmark or step % cfg.log_interval == 0:
            metrics.train(step, ranks.mean(loss).item(), lr, grad_norm.item() if grad_norm is not None else None)
    saver.settle()
    metrics.close()
    if pulse.stop and not (last and evaluated):
        pulse.leave(saved)


def describe(ranks: Ranks, batches: Batches, trainer: Trainer, origin: Origin) -> dict[str, Any]:
    """What a checkpoint is of."""
    about: dict[str, Any] = {"model": asdict(origin.model), "tokenizer": batches.dataset.tokenizer.describe()}
    about |= {"vocab_size": batches.dataset.vocab_size, "init_from": origin.init_from}
    return about | layout(trainer, ranks)


def layout(trainer: Trainer, ranks: Ranks) -> dict[str, Any]:
    """How the model state lies in the files."""
    dtype = str(trainer.dtype).removeprefix("torch.")
    return {"strategy": trainer.strategy, "world_size": ranks.world_size, "dtype": dtype}
