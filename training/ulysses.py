"""Sequence parallelism: each rank has a part of the positions of every sequence (DeepSpeed-Ulysses, arXiv:2309.14509).

Only attention needs the other positions. Around it, the ranks of a group trade all heads of some positions for some
heads of all positions. Nothing else changes: the mean of the gradients over all ranks, which DDP, FSDP2 and ZeRO take
anyway, is the gradient of the mean loss. DeepSpeed is not told, because its own way drops gradients under ZeRO-1 and 2.
"""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd

from model import CausalSelfAttention
from training.distributed import Ranks


def split_sequences(model: nn.Module, block_size: int, ranks: Ranks) -> None:
    """Let the model compute this rank's part of each sequence. A collective."""
    size = ranks.layout.sequence
    by_group = torch.arange(ranks.world_size).view(-1, size, ranks.layout.tensor).transpose(1, 2).reshape(-1, size)
    group, _ = dist.new_subgroups_by_enumeration(by_group.tolist())
    first_position = ranks.sequence_rank * block_size // size
    for module in model.modules():
        if isinstance(module, CausalSelfAttention):
            module.attend = partial(attend, group)
        if hasattr(module, "first_position"):
            setattr(module, "first_position", first_position)  # noqa: B010 (mypy: modules have parameters only)


def attend(group: Any, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """Attention over whole sequences; q, k, v and the result: (B, heads, T / ranks of the group, head_size)."""
    q, k, v = (exchange(x, group, split=1, join=2) for x in (q, k, v))
    return exchange(F.scaled_dot_product_attention(q, k, v, **options), group, split=2, join=1)


def exchange(x: Tensor, group: Any, split: int, join: int) -> Tensor:
    """Send a part of dimension `split` to each rank of the group, and join what they send along dimension `join`."""
    parts = torch.stack(x.chunk(group.size(), split))
    return torch.cat(all_to_all_single_autograd(parts, None, None, group).unbind(), join)
