"""Mixture of experts: the auxiliary loss that makes the routers use all of them."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import GPTConfig


class Balance:
    """Load balancing loss of Switch Transformer (Fedus et al., arXiv:2101.03961, equations 4 to 6).

    The mean over the blocks of n_expert sum_i f_i P_i: f_i is expert i's share of the tokens, P_i its mean probability.
    1 is even, n_expert is all on one. Create it after deepspeed.initialize, which may replace the routers.
    """

    def __init__(self, model: nn.Module, config: GPTConfig, weight: float):
        self.config, self.weight = config, weight
        self.scores = list[Tensor]()  # of the routers, in order
        self.values = list[Tensor]()  # of the micro-steps
        for name, module in model.named_modules():
            if name.endswith(".router.gate"):
                module.register_forward_hook(self.keep)

    def keep(self, gate: nn.Module, inputs: tuple[Tensor, ...], scores: Tensor) -> None:
        if gate.training:
            self.scores.append(scores)

    def add_to(self, loss: Tensor) -> Tensor:
        """The loss of the last forward pass with the balancing loss."""
        value = torch.zeros_like(loss)
        for scores in self.scores[-self.config.n_layer :]:  # before them are those of a recomputation in backward
            probabilities = F.softmax(scores.float(), dim=-1)
            chosen = probabilities.topk(self.config.n_active).indices.flatten()
            share = chosen.bincount(minlength=self.config.n_expert) / chosen.numel()
            value = value + self.config.n_expert / self.config.n_layer * (share * probabilities.mean(0)).sum()
        self.scores.clear()
        self.values.append(value.detach())
        return loss + self.weight * value

    def metrics(self) -> dict[str, Any]:
        """This rank's mean over the micro-steps since the last call."""
        mean = torch.stack(self.values).mean()
        self.values.clear()
        return {"expert_balance": mean}
