"""DeepSpeed's Muon with our groups and arithmetic: its own iterates in half precision, and would take wte and wpe."""

import torch
from deepspeed.runtime.zero.muon import original_muon
from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam
from torch import nn

from training.config import TrainConfig
from training.muon import nesterov, orthogonalize
from training.optim import parameter_groups


def make_muon(model: nn.Module, cfg: TrainConfig) -> torch.optim.Optimizer:
    original_muon.muon_update = lambda grad, momentum, beta, **_: orthogonalize(nesterov(grad, momentum, beta))
    adamw = {"lr": cfg.learning_rate, "betas": (cfg.beta1, cfg.beta2), "eps": 1e-8}
    groups = []
    for group in parameter_groups(model, cfg):
        use_muon = "momentum" in group
        for parameter in group["params"]:
            parameter.use_muon = use_muon
        groups.append({**({} if use_muon else adamw), **group, "use_muon": use_muon})
    return MuonWithAuxAdam(groups, torch.optim.AdamW, {**adamw, "fused": True})
