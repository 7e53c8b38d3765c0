"""The outer loop: evaluate, save, step, log. Written once for both train scripts, whose Trainers differ."""

import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Protocol

import torch
from torch import Tensor

from training.batches import Batches
from training.checkpoint import Checkpoints, CheckpointWriter, Saver
from training.config import TrainConfig
from training.distributed import Ranks
from training.init import InitState
from training.metrics import Metrics
from training.run_control import RunControl


class Trainer(Protocol):
    """The seams of a train script: how a loss is computed, how a step is taken, which files hold the model state."""

    dtype: torch.dtype
    strategy: str

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor: ...

    def train_step(self, step: int) -> dict[str, Any]:
        """One update. Returns this rank's mean "loss", the global "grad_norm" or None, and other numbers to log."""

    def save(self, writer: CheckpointWriter) -> None: ...


def train(
    cfg: TrainConfig, ranks: Ranks, batches: Batches, trainer: Trainer, checkpoints: Checkpoints, init: InitState
) -> None:
    """Train from init.step on; steps are numbered by the updates before them. Raises Stopped if the run is to stop."""
    metrics = Metrics(cfg, ranks, batches, init, trainer.dtype)
    control = RunControl(cfg, ranks, checkpoints, trainer.dtype)
    saver = Saver(checkpoints, cfg.async_save)
    best, evaluated = init.best_val_loss or math.inf, init.evaluated
    saved_step = init.step - (not evaluated and init.step > 0)  # step of the newest checkpoint; step 0 needs none
    for step in range(init.step, metrics.end + 1):
        last, improved = step == metrics.end or cfg.eval_only, False
        if cfg.eval_only or ((last or step % cfg.eval_interval == 0) and not (evaluated or cfg.benchmark)):
            with metrics.untimed():
                losses = evaluate(trainer, batches, cfg.eval_iters, control.poll)
            if losses:  # empty if the run was asked to stop meanwhile
                metrics.log_evaluation(step, losses)
                evaluated, improved, best = True, losses["val_loss"] < best, min(best, losses["val_loss"])
        save = improved or control.stop or control.save or (evaluated and cfg.always_save_checkpoint)
        if save and step > saved_step and not (cfg.eval_only or cfg.benchmark):
            progress = {"step": step, "best_val_loss": best, "evaluated": evaluated, "optimizer": cfg.optimizer}
            metadata = progress | describe_run(ranks, batches, trainer, init)
            with metrics.saving(step), control.saving(), saver.writing(metadata, improved) as writer:
                trainer.save(writer)
            saved_step = step
        if last or control.stop:
            break
        step_metrics = trainer.train_step(step)
        evaluated = False
        control.step_done(step, step_metrics["loss"], step_metrics["grad_norm"])
        metrics.count_step()
        if cfg.benchmark or step % cfg.log_interval == 0:
            metrics.log_step(step, step_metrics)
    control.exchange()  # a NaN or inf in the last step
    saver.wait(last=True)
    metrics.close(best)
    if control.stop and not (last and evaluated):
        control.raise_stopped(saved_step)


@torch.no_grad()
def evaluate(trainer: Trainer, batches: Batches, count: int, should_stop: Callable[[], bool]) -> dict[str, float]:
    """The losses in nats per token over `count` batches of each split; {} if asked to stop meanwhile. A collective.

    All ranks take equally many forward passes, because each is a collective under ZeRO-3 and FSDP2.
    """
    ranks = batches.ranks
    sums = torch.zeros(2, device=ranks.device)
    for number, split in enumerate(("train", "val")):
        for first in ranks.progress(range(0, count, ranks.data_size), f"evaluating {split}"):
            index = first + ranks.data_rank
            loss = trainer.loss(*batches.evaluation(split, index))
            if index < count:
                sums[number] += loss
            if should_stop():
                return {}
    copies = ranks.world_size // ranks.data_size  # ranks with the same batch
    train_loss, val_loss = (sum(losses) / copies / count for losses in zip(*ranks.share(sums.tolist()), strict=True))
    return {"train_loss": train_loss, "val_loss": val_loss}


def describe_run(ranks: Ranks, batches: Batches, trainer: Trainer, init: InitState) -> dict[str, Any]:
    """The part of a checkpoint's metadata that stays the same through the run."""
    return {
        "model": asdict(init.model),
        "tokenizer": batches.dataset.tokenizer.description,
        "vocab_size": batches.dataset.vocab_size,
        "init_from": init.init_from,
        "strategy": trainer.strategy,
        "world_size": ranks.world_size,
        "layout": asdict(ranks.layout),
        "dtype": str(trainer.dtype).removeprefix("torch."),
    }
