"""AdamW (Loshchilov & Hutter, arXiv:1711.05101) with weight decay on matrices only, and the learning rate."""

import math

import torch
from torch import nn

from training.train_config import TrainConfig


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Matrices and embeddings decay; biases and layer norms (one dimension) do not. Tied weights are listed once."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if dimensions(p) >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if dimensions(p) < 2], "weight_decay": 0.0},
    ]


def dimensions(parameter: nn.Parameter) -> int:
    """Of the whole parameter: under ZeRO-3 an empty shell stands for it, and ds_shape is its shape."""
    return len(getattr(parameter, "ds_shape", parameter.shape))


def adamw(groups: list[dict], cfg: TrainConfig) -> torch.optim.AdamW:
    """fused: one kernel for all parameters, on CPUs too (there, torch's default is a Python loop over them)."""
    return torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2), fused=True)


def learning_rate(cfg: TrainConfig, step: int) -> float:
    """Linear warm-up, then a cosine down to min_lr (Loshchilov & Hutter, arXiv:1608.03983)."""
    if not cfg.decay_lr:
        return cfg.learning_rate
    if step < cfg.warmup_iters:
        return cfg.learning_rate * (step + 1) / (cfg.warmup_iters + 1)
    if step >= cfg.lr_decay_iters:
        return cfg.min_lr
    progress = (step - cfg.warmup_iters) / (cfg.lr_decay_iters - cfg.warmup_iters)
    return cfg.min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (cfg.learning_rate - cfg.min_lr)


def set_learning_rate(optimizer: torch.optim.Optimizer, cfg: TrainConfig, step: int) -> float:
    lr = learning_rate(cfg, step)
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr
