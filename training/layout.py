"""Rules and words of the ways to split a model over ranks, and of experts; only runs that use them import it."""

from collections.abc import Iterator
from typing import Any

from training.distributed import Ranks, world_size
from training.errors import count


def problems(cfg: Any) -> Iterator[tuple[str, str]]:
    """Rules that do not depend on the ZeRO stage. cfg: TrainConfig, which imports this module."""
    layout, ranks = cfg.layout(), world_size()
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
    heads = layout.tensor * layout.sequence
    for name in ("n_kv_head", "n_head"):
        if getattr(cfg, name) % heads:
            yield name, f"must be divisible by tensor_parallel x sequence_parallel = {heads}"
    if cfg.block_size % layout.sequence:
        yield "block_size", f"must be divisible by sequence_parallel = {layout.sequence}"
    if cfg.dropout and sizes:
        yield "dropout", f"must be 0 with {names}: ranks that share a sequence would draw other masks than one rank"
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


def describe(ranks: Ranks) -> str:
    """ "8 ranks = 2 pipeline x 2 data x 2 tensor"."""
    layout = ranks.layout
    sizes = {"pipeline": layout.pipeline, "data": ranks.data_size, "sequence": layout.sequence, "tensor": layout.tensor}
    factors = " x ".join(f"{size} {name}" for name, size in sizes.items() if size > 1)
    experts = f", experts split over {layout.expert}" if layout.expert > 1 else ""
    return f"{count(ranks.world_size, 'rank')} = {factors}{experts}"
