"""Tensor and expert parallelism by DeepSpeed (AutoTP and AutoEP): how each parameter is cut, their JSON, their rules.

A rank has a part of one dimension of a parameter; of a fused matrix, such as queries, keys and values, the same part of
each of its sections.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from model import GPTConfig
from training.config import TrainConfig
from training.deepspeed_json import Json
from training.deepspeed_layout import EXPERTS, Pieces
from training.distributed import Layout, Ranks
from training.model_state import SavedState, model_shapes
from training.parallel import split_sequences

Cut = tuple[int, tuple[int, ...]]  # the dimension, and the sizes of its sections
FIRST_BLOCK = "transformer.h.0"


def cuts(config: GPTConfig, layout: Layout) -> dict[str, Cut]:
    """How tensor parallelism cuts parameters; every rank has all of the others, except for experts."""
    heads = tuple(number * config.head_size for number in (config.n_head, config.n_kv_head, config.n_kv_head))
    found: dict[str, Cut] = {}
    for name, shape in model_shapes(config).items():
        module, kind = name.split(".")[-2:]
        if module == "c_attn":
            found[name] = 0, heads
        elif module == "c_fc":
            found[name] = 0, (config.n_hidden,) * (shape[0] // config.n_hidden)  # swiglu: gate and value
        elif module == "c_proj" and kind == "weight":
            found[name] = 1, (shape[1],)
        elif splits_vocabulary(config, layout) and (module == "lm_head" or (module == "wte" and config.tied)):
            found[name] = 0, (shape[0],)
    return found if layout.tensor > 1 else {}


def splits_vocabulary(config: GPTConfig, layout: Layout) -> bool:
    """Whether ranks compute the logits of a part of the vocabulary. A pipeline's stages have all of it."""
    return layout.tensor > 1 and layout.pipeline == 1 and config.vocab_size % layout.tensor == 0


def partition_config(config: GPTConfig, layout: Layout) -> Json:
    """AutoTP's. It leaves out what no pattern matches."""
    specs: list[Json] = []
    for name, (dimension, sections) in cuts(config, layout).items():
        if name.startswith(FIRST_BLOCK) and name.endswith(".weight"):
            pattern = f".*{re.escape(name.removeprefix(FIRST_BLOCK))}$"
            fused = {"shape": [list(sections), -1], "partition_dim": 0} if len(sections) > 1 else {}
            specs.append({"patterns": [pattern], "partition_type": ("column", "row")[dimension], **fused})
    if config.qk_norm:  # each rank has the gradient of its heads
        specs.append({"patterns": [r".*\.[qk]_norm\.weight$"], "partition_type": "skip", "grad_allreduce": True})
    return {"use_default_specs": False, "layer_specs": specs}


def json_blocks(config: GPTConfig, layout: Layout) -> Json:
    """The blocks of DeepSpeed's JSON; a pipeline's stages are cut by deepspeed_pipeline.py."""
    blocks: Json = {}
    if layout.tensor > 1 and layout.pipeline == 1:
        blocks["tensor_parallel"] = {"autotp_size": layout.tensor, "partition_config": partition_config(config, layout)}
        blocks["tensor_parallel"]["vocab_parallel_lm_head"] = splits_vocabulary(config, layout)
    if layout.expert > 1:
        blocks["expert_parallel"] = {
            **dict(enabled=True, autoep_size=layout.expert, moe_layer_pattern=r"transformer\.h\.\d+\.mlp"),
            **dict(router_pattern="router", expert_pattern="experts", expert_w1="w1", expert_w2="w2", expert_w3="w3"),
            **dict(top_k=config.n_active, route_norm=True),
        }
    if layout.pipeline > 1:
        interval = int(config.activation_checkpointing)
        blocks["pipeline"] = {"use_reentrant": False, "activation_checkpoint_interval": interval}
    return blocks


def check(cfg: TrainConfig, ranks: Ranks, config: GPTConfig, strategy: str) -> Iterator[str]:
    """Combinations that DeepSpeed refuses, or trains wrongly without a word. strategy: strategy_of its JSON."""
    layout, stage = ranks.layout, int(strategy[len("zero")])
    pipeline = f"pipeline_parallel = {layout.pipeline}"
    for name, size in vars(layout).items():
        if size > 1 and stage == 0 and name != "sequence":
            yield f"{name}_parallel = {size}: needs ZeRO stage 1 or higher, whose gradient norm counts all ranks' parts"
    if layout.pipeline > 1 and stage > 1:
        yield f"{pipeline}: needs ZeRO stage 1, stage is {stage}; use deepspeed_configs/zero1_config.json"
    if layout.pipeline > config.n_layer:
        yield f"{pipeline}: needs as many blocks, n_layer = {config.n_layer}; set --pipeline_parallel={config.n_layer}"
    if layout.pipeline > 1 and cfg.eval_iters % ranks.data_size:
        rule = f"with {pipeline}, must be divisible by the number of data-parallel ranks, {ranks.data_size}"
        yield f"eval_iters = {cfg.eval_iters}: {rule}"
    if layout.expert > 1 and layout.tensor > 1 and stage < 3:
        yield f"expert_parallel = {layout.expert}: with tensor_parallel, needs ZeRO stage 3, stage is {stage}"
    if layout.expert > 1 and strategy.endswith("nvme"):
        yield f"expert_parallel = {layout.expert}: DeepSpeed cannot save experts from NVMe; offload to the CPU"
    if layout.tensor * layout.expert > 1 and strategy.endswith("hpz"):
        yield "zero_hpz_partition_size: not with tensor or expert parallelism; use deepspeed_configs/zero3_config.json"
    if layout.tensor > 1 and cfg.optimizer == "muon":
        yield f"tensor_parallel = {layout.tensor}: Muon needs whole matrices; use --optimizer=adamw"


@dataclass
class Lazy:
    """A piece of model state that is put together whenever it is read."""

    size: int
    make: Callable[[], Tensor]

    def numel(self) -> int:
        return self.size

    def flatten(self) -> Tensor:
        return self.make().flatten()


def join(parts: list[tuple[SavedState, Pieces]], config: GPTConfig, layout: Layout) -> SavedState:
    """The whole state from its parts, by pipeline stage and tensor-parallel rank."""
    by_name = cuts(config, layout)
    saved = replace(parts[0][0], shapes={}, pieces={})
    for first in range(0, len(parts), layout.tensor):
        stage = parts[first : first + layout.tensor]
        shards = [shard for shard, _ in stage]
        for name, shape in shards[0].shapes.items():
            times = layout.expert if EXPERTS in name else layout.tensor if name in by_name else 1
            saved.shapes[name] = scaled(shape, by_name.get(name, (0,))[0], times)
        for (name, kind), pieces in shards[0].pieces.items():
            if cut := by_name.get(name):
                pieces = [Lazy(saved.shapes[name].numel(), partial(joined, shards, name, kind, cut))]
            elif EXPERTS in name:
                by_rank = {rank: piece for _, experts in stage for rank, piece in experts[name, kind].items()}
                order = sorted(by_rank, key=lambda rank: (rank % layout.expert, rank))
                pieces = [by_rank[rank] for rank in order]
            saved.pieces[name, kind] = pieces
    return saved


def joined(shards: list[SavedState], name: str, kind: str, cut: Cut) -> Tensor:
    dimension, sections = cut
    sizes = [size // len(shards) for size in sections]
    parts = zip(*(shard.whole(name, kind).split(sizes, dimension) for shard in shards), strict=True)
    return torch.cat([part for section in parts for part in section], dimension)


def own_part(saved: SavedState, config: GPTConfig, ranks: Ranks) -> SavedState:
    """This rank's part of the whole state."""
    layout, shapes, pieces = ranks.layout, dict(saved.shapes), dict(saved.pieces)
    by_name = {name: (cut, layout.tensor, ranks.rank) for name, cut in cuts(config, layout).items()}
    in_stage = ranks.rank % (ranks.world_size // layout.pipeline)
    by_name |= {name: ((0, (config.n_expert,)), layout.expert, in_stage) for name in shapes if EXPERTS in name}
    for name, (cut, parts, rank) in by_name.items():
        shapes[name] = scaled(shapes[name], cut[0], 1 / parts)
        for kind in (kind for other, kind in saved.pieces if other == name):
            make = partial(cut_out, saved, name, kind, cut, rank % parts, parts)
            pieces[name, kind] = [Lazy(shapes[name].numel(), make)]
    return replace(saved, shapes=shapes, pieces=pieces)


def scaled(shape: torch.Size, dimension: int, factor: float) -> torch.Size:
    return torch.Size(round(size * factor) if number == dimension else size for number, size in enumerate(shape))


def cut_out(saved: SavedState, name: str, kind: str, cut: Cut, part: int, parts: int) -> Tensor:
    dimension, sections = cut
    whole = saved.whole(name, kind).split(sections, dimension)
    return torch.cat([section.chunk(parts, dimension)[part] for section in whole], dimension)


def split(model: Any, config: GPTConfig, ranks: Ranks) -> None:
    """Change a new model for what deepspeed.initialize does not do by itself."""
    if ranks.layout.sequence > 1:
        split_sequences(model, config.block_size, ranks)
    if ranks.layout.tensor > 1 and ranks.layout.pipeline > 1:
        from training.deepspeed_pipeline import cut_matrices

        cut_matrices(model, config, ranks)
    elif splits_vocabulary(config, ranks.layout):
        model.loss_function = None  # DeepSpeed's takes its place
        model.loss = lambda logits, targets: model.loss_function(logits, shift_labels=targets)
