"""Splitting a model over ranks, in both scripts: the rules, sequence parallelism, and the load balance of experts.

Under sequence parallelism (DeepSpeed-Ulysses, arXiv:2309.14509), each rank has a part of the positions of a sequence.
Only attention needs the others: around it, ranks trade all heads of some positions for some heads of all. The mean of
the gradients over all ranks, which DDP, FSDP2 and ZeRO take anyway, is the gradient of the mean loss. DeepSpeed is not
told, because its own way drops gradients under ZeRO-1 and 2.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd

from model import CausalSelfAttention, GPTConfig
from training.distributed import Layout, Ranks
from training.errors import count


def problems(cfg: Any, layout: Layout, ranks: int, local_ranks: int) -> Iterator[tuple[str, str]]:
    """Rules that do not depend on the ZeRO stage. cfg: TrainConfig, which imports this module."""
    sizes = {f"{name}_parallel": size for name, size in vars(layout).items() if size != 1}
    names, product = " x ".join(sizes), layout.tensor * layout.sequence * layout.pipeline
    if negative := [name for name, size in sizes.items() if size < 1]:
        yield from ((name, "must be above 0") for name in negative)
        return
    if ranks % product:
        near = max(n for n in range(1, ranks + 1) if ranks % n == 0 and n <= max(1, product))
        together = f"{names} = {product} " if len(sizes) > 1 else ""
        yield next(iter(sizes)), f"{together}must divide the number of ranks, {ranks}, as {near} does"
        return
    if ranks // layout.pipeline % layout.expert:
        yield "expert_parallel", f"must divide the {ranks // layout.pipeline} ranks of a pipeline stage"
    if local_ranks % layout.tensor and not cfg.tensor_across_nodes:
        yield "tensor_parallel", f"must divide the {local_ranks} ranks of a node; or set --tensor_across_nodes"
    heads, name = layout.tensor * layout.sequence, "n_kv_head" if cfg.n_kv_head else "n_head"
    if getattr(cfg, name) % heads:  # n_head is a multiple of n_kv_head
        yield name, f"must be divisible by tensor_parallel x sequence_parallel = {heads}"
    if cfg.block_size % layout.sequence:
        yield "block_size", f"must be divisible by sequence_parallel = {layout.sequence}"
    if cfg.dropout and sizes:
        yield "dropout", f"must be 0 with {names}: ranks that share a sequence would draw other masks than one rank"
    if cfg.n_expert and cfg.expert_balance and layout.pipeline * layout.sequence > 1:
        yield "expert_balance", f"must be 0 with {names}: a rank has a part of the blocks or positions only"
    if cfg.compile and (cfg.n_expert or layout.pipeline > 1):
        yield "compile", "must be False with experts (torch compiles their matmul in bfloat16 only) and with a pipeline"
    if layout.expert > 1 and not cfg.n_expert:
        yield "expert_parallel", "needs a model with experts; set --n_expert"
    elif cfg.n_expert % layout.expert:
        yield "expert_parallel", f"must divide n_expert = {cfg.n_expert}"
    if cfg.n_expert and (cfg.mlp != "swiglu" or cfg.bias):
        yield "n_expert", "experts are SwiGLU MLPs without biases; set --mlp=swiglu --bias=False"
    if cfg.n_expert and cfg.n_active > cfg.n_expert:
        yield "n_active", f"must be at most n_expert = {cfg.n_expert}"
    if cfg.n_expert and cfg.optimizer == "muon":
        yield "optimizer", "experts are stacks of matrices, which Muon does not know; set --optimizer=adamw"


def dimensions(layout: Layout, world_size: int) -> dict[str, int]:
    """The number of ranks in each dimension, outermost first."""
    data = layout.data(world_size)
    return {"pipeline": layout.pipeline, "data": data, "sequence": layout.sequence, "tensor": layout.tensor}


def describe(ranks: Ranks) -> str:
    """ "8 ranks = 2 pipeline x 2 data x 2 tensor"."""
    sizes, experts = dimensions(ranks.layout, ranks.world_size), ranks.layout.expert
    factors = " x ".join(f"{size} {name}" for name, size in sizes.items() if size > 1)
    return f"{count(ranks.world_size, 'rank')} = {factors}" + (f", experts split over {experts}" if experts > 1 else "")


def place(layout: Layout, world_size: int, rank: int) -> str:
    """ "rank 5 (pipeline 1, data 0, tensor 1)"."""
    sizes = dimensions(layout, world_size)
    numbers = zip(sizes, np.unravel_index(rank, tuple(sizes.values())), strict=True)
    return f"rank {rank} ({', '.join(f'{name} {number}' for name, number in numbers if sizes[name] > 1)})"


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
