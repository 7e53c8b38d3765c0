"""The optimizer, AdamW (Loshchilov & Hutter, arXiv:1711.05101) or Muon, and the learning rate schedule."""

import math
from typing import Any

import torch
from torch import nn

from training.config import TrainConfig


def make_optimizer(model: nn.Module, cfg: TrainConfig) -> torch.optim.Optimizer:
    """fused: one kernel for all parameters, on CPUs too (torch's default there is a Python loop over parameters)."""
    make: type[torch.optim.AdamW] = torch.optim.AdamW
    if cfg.optimizer == "muon":
        from training.muon import Muon as make
    return make(parameter_groups(model, cfg), lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2), fused=True)


def parameter_groups(model: nn.Module, cfg: TrainConfig) -> list[dict]:
    """Matrices have weight decay, biases and norms do not.

    With Muon, matrices inside the blocks also have "momentum"; DeepSpeed averages experts' gradients over fewer ranks.
    """
    hidden, matrices, vectors, experts = (list[nn.Parameter]() for _ in range(4))
    expert_ranks = cfg.layout().expert
    for name, parameter in model.named_parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)  # ds_shape: ZeRO-3's full shape, the local one is (0,)
        use_muon = cfg.optimizer == "muon" and ".h." in name
        split = expert_ranks > 1 and ".experts." in name
        (vectors if len(shape) < 2 else experts if split else hidden if use_muon else matrices).append(parameter)
    decay = {"weight_decay": cfg.weight_decay}
    groups = [{"params": matrices, **decay}, {"params": vectors, "weight_decay": 0.0}]
    if hidden:
        muon = {"momentum": 0.95, "lr": cfg.muon_lr, "lr_scale": cfg.muon_lr / cfg.learning_rate}
        groups.append({"params": hidden, **decay, **muon})
    if experts:
        groups.append({"params": experts, **decay, "moe": True, "name": f"ep_size_{expert_ranks}"})
    return groups


def states_by_name(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """{parameter: its optimizer state}: how checkpoints of one process and DDP store it."""
    return {name: dict(optimizer.state[parameter]) for name, parameter in model.named_parameters()}


def learning_rate(cfg: TrainConfig, step: int) -> float:
    """Linear warm-up, then cosine decay to min_lr (Loshchilov & Hutter, arXiv:1608.03983)."""
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
        group["lr"] = lr * group.get("lr_scale", 1.0)
    return lr
