"""GPT as DeepSpeed's PipelineModule: stages of consecutive blocks, with GPT's own modules and parameter names."""

from typing import Any

import torch
import torch.nn.functional as F
from deepspeed.module_inject import set_autotp_mode
from deepspeed.module_inject.auto_tp import AutoTP
from deepspeed.module_inject.autotp_config import AutoTPConfig
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from deepspeed.utils import groups
from torch import Tensor, nn

from model import Block, GPTConfig, Linear, cross_entropy, make_norm, rotations
from training.deepspeed_parallel import partition_config
from training.distributed import Ranks


class Positions(nn.Embedding):
    """Adds the position embeddings, (B, T, C) -> (B, T, C)."""

    first_position = 0  # under sequence parallelism, of this rank's part

    def forward(self, x: Tensor) -> Tensor:
        start = self.first_position
        return x + super().forward(torch.arange(start, start + x.size(1), device=x.device))


class RotatedBlock(Block):
    """A block with its own rotations, because stages pass on nothing but x."""

    first_position = 0
    rotations: Tensor

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__(config, layer)
        self.register_buffer("rotations", rotations(config), persistent=False)

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        start = self.first_position
        return super().forward(x, self.rotations[:, start : start + x.size(1)])


def build_pipeline(config: GPTConfig, ranks: Ranks) -> PipelineModule:
    """This rank's stage, with as many parameters as the others; uninitialized."""
    layout, matrix = ranks.layout, (config.vocab_size, config.n_embd)
    embedding, head = LayerSpec(nn.Embedding, *matrix), LayerSpec(Linear, *reversed(matrix), bias=False)
    if config.tied:
        embedding = TiedLayerSpec("wte", nn.Embedding, *matrix)
        head = TiedLayerSpec("wte", nn.Embedding, *matrix, forward_fn=lambda wte, x: F.linear(x, wte.weight))
    layers: dict[str, Any] = {"transformer.wte": embedding}
    if not config.rope_theta:
        layers["transformer.wpe"] = LayerSpec(Positions, config.block_size, config.n_embd)
    block = RotatedBlock if config.rope_theta else Block
    layers |= {f"transformer.h.{number}": LayerSpec(block, config, number) for number in range(config.n_layer)}
    layers |= {"transformer.ln_f": make_norm(config), "lm_head": head}
    replicas = ranks.world_size // (layout.pipeline * layout.tensor)
    topology = PipeModelDataParallelTopology(num_pp=layout.pipeline, num_mp=layout.tensor, num_dp=replicas)
    loss = lambda logits, targets: cross_entropy(logits.flatten(0, 1), targets.flatten())  # noqa: E731
    model = PipelineModule(list(layers.values()), topology=topology, loss_fn=loss)
    rename(model, list(layers))
    return model


def rename(model: PipelineModule, names: list[str]) -> None:
    """Give the layers their names in GPT. Stages run a list of functions, in which the modules stay."""
    model.transformer = nn.Module()
    model.transformer.h = nn.ModuleDict()
    for number in [name for name in model._modules if name.isdigit()]:
        parent, _, name = names[int(number)].rpartition(".")
        model.get_submodule(parent).add_module(name, model._modules.pop(number))
    tied = dict(model._modules.pop("tied_modules"))
    for name, module in tied.items():
        model.transformer.add_module(name, module)
    model.tied_modules = tied  # a plain dict, in which PipelineModule looks them up


def cut_matrices(model: PipelineModule, config: GPTConfig, ranks: Ranks) -> None:
    """Tensor parallelism inside a stage, which DeepSpeed's engine cannot do but its parts can."""
    groups._TENSOR_MODEL_PARALLEL_GROUP = group = model._grid.get_slice_parallel_group()
    set_autotp_mode(training=True)  # without it, these layers have no gradients
    plan, kinds = AutoTPConfig.from_dict(partition_config(config, ranks.layout)), (nn.Linear, nn.Embedding)
    cutter = AutoTP(model, (), "", None, kinds, None, training_mode=True, partition_config=plan)
    cutter.set_tensor_parallel_config(ranks.layout.tensor, group)
    cutter.update_linear_policies()
    cutter._replace_module(model)
    cutter.register_replicated_grad_hooks(model)
