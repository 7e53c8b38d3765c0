"""Tensor and expert parallelism by DeepSpeed (AutoTP and AutoEP): how each parameter is cut, their JSON, their rules.

A rank has a part of one dimension of a parameter; of a fused matrix, such as queries, keys and values, the same part of
each of its sections.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from model import GPTConfig
from training.config import TrainConfig
from training.deepspeed_json import Json
from training.distributed import Layout, Ranks
from training.model_state import SavedState, model_shapes

Cut = tuple[int, tuple[int, ...]]  # the dimension, and the sizes of its sections
FIRST_BLOCK = "transformer.h.0"


def cuts(config: GPTConfig, layout: Layout) -> dict[str, Cut]:
    """How tensor parallelism cuts parameters; every rank has all of the others, except experts."""
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


def partition_specs(config: GPTConfig, layout: Layout) -> list[Json]:
    """AutoTP's layer_specs. It leaves out what no pattern matches."""
    specs: list[Json] = []
    for name, (dimension, sections) in cuts(config, layout).items():
        if name.startswith(FIRST_BLOCK) and name.endswith(".weight"):
            pattern = f".*{re.escape(name.removeprefix(FIRST_BLOCK))}$"
            fused = {"shape": [list(sections), -1], "partition_dim": 0} if len(sections) > 1 else {}
            specs.append({"patterns": [pattern], "partition_type": ("column", "row")[dimension], **fused})
    if config.qk_norm:  # each rank has the gradient of its heads
        specs.append({"patterns": [r".*\.[qk]_norm\.weight$"], "partition_type": "skip", "grad_allreduce": True})
    return specs


def json_blocks(config: GPTConfig, layout: Layout) -> Json:
    """The blocks of DeepSpeed's JSON; a pipeline's stages are cut by deepspeed_pipeline.py."""
    blocks: Json = {}
    if layout.tensor > 1 and layout.pipeline == 1:
        partition = {"use_default_specs": False, "layer_specs": partition_specs(config, layout)}
        blocks["tensor_parallel"] = {"autotp_size": layout.tensor, "partition_config": partition}
        blocks["tensor_parallel"]["vocab_parallel_lm_head"] = splits_vocabulary(config, layout)
    if layout.pipeline > 1:
        interval = int(config.activation_checkpointing)
        blocks["pipeline"] = {"use_reentrant": False, "activation_checkpoint_interval": interval}
    return blocks


def check(cfg: TrainConfig, ranks: Ranks, config: GPTConfig, stage: int) -> Iterator[str]:
    """Combinations that DeepSpeed refuses, or trains wrongly without a word."""
    layout = ranks.layout
    pipeline = f"pipeline_parallel = {layout.pipeline}"
    for name in ("tensor", "pipeline", "expert"):
        size = getattr(layout, name)
        if size > 1 and stage == 0:
            yield f"{name}_parallel = {size}: needs ZeRO stage 1 or higher, whose gradient norm counts all ranks' parts"
    if layout.pipeline > 1 and stage > 1:
        yield f"{pipeline}: needs ZeRO stage 1, stage is {stage}; use deepspeed_configs/zero1_config.json"
    if layout.pipeline > config.n_layer:
        yield f"{pipeline}: needs as many blocks, n_layer = {config.n_layer}; set --pipeline_parallel={config.n_layer}"
    if layout.pipeline > 1 and cfg.eval_iters % ranks.data_size:
        rule = f"with {pipeline}, must be divisible by the number of data-parallel ranks, {ranks.data_size}"
        yield f"eval_iters = {cfg.eval_iters}: {rule}"
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


def join(stages: list[list[SavedState]], config: GPTConfig, layout: Layout) -> SavedState:
    """The whole state from those of each pipeline stage's tensor-parallel ranks."""
    first, by_name = stages[0][0], cuts(config, layout)
    saved = replace(first, shapes={}, pieces={})
    for shards in stages:
        for name, shape in shards[0].shapes.items():
            whole = list(shape)
            if name in by_name:
                whole[by_name[name][0]] *= len(shards)
            saved.shapes[name] = torch.Size(whole)
        for (name, kind), pieces in shards[0].pieces.items():
            cut = by_name.get(name)
            if cut:
                size = saved.shapes[name].numel()
                pieces = [Lazy(size, lambda n=name, k=kind, s=shards, c=cut: joined([x.whole(n, k) for x in s], c))]
            saved.pieces[name, kind] = pieces
    return saved


def joined(shards: list[Tensor], cut: Cut) -> Tensor:
    dimension, sections = cut
    sizes = [size // len(shards) for size in sections]
    parts = zip(*(shard.split(sizes, dimension) for shard in shards), strict=True)
    return torch.cat([part for section in parts for part in section], dimension)


def own_part(saved: SavedState, config: GPTConfig, ranks: Ranks) -> SavedState:
    """What this rank has of the whole state."""
    size = ranks.layout.tensor
    shapes, pieces = dict(saved.shapes), dict(saved.pieces)
    for name, cut in cuts(config, ranks.layout).items():
        shape = list(shapes[name])
        shape[cut[0]] //= size
        shapes[name] = torch.Size(shape)
        for kind in (kind for part, kind in saved.pieces if part == name):
            make = lambda n=name, k=kind, c=cut: cut_out(saved.whole(n, k), c, ranks.rank % size, size)  # noqa: E731
            pieces[name, kind] = [Lazy(shapes[name].numel(), make)]
    return replace(saved, shapes=shapes, pieces=pieces)


def cut_out(whole: Tensor, cut: Cut, part: int, parts: int) -> Tensor:
    dimension, sections = cut
    return torch.cat([section.chunk(parts, dimension)[part] for section in whole.split(sections, dimension)], dimension)


def use_split_loss(model: Any) -> None:
    """Use DeepSpeed's loss, for logits of which each rank has a part of the vocabulary."""
    model.loss = lambda logits, targets: model.loss_function(logits, shift_labels=targets)
