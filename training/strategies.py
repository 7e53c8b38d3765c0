"""Strategies: how the model state is divided over ranks and devices, and what to try when memory runs out."""

import json
from dataclasses import dataclass, field
from functools import cache

import torch

from data.errors import did_you_mean
from model import GPTConfig
from training.config import ROOT, TrainConfig
from training.deepspeed_config import Json, describe_json
from training.distributed import Ranks
from training.errors import UserError


@dataclass(frozen=True)
class Strategy:
    name: str
    script: str
    launcher: str
    arguments: tuple[str, ...] = ()  # that select it; {half} stands for half of the ranks
    stage: int = 0  # partitioned over the ranks: 0 nothing, 1 optimizer states, 2 gradients too, 3 parameters too
    optimizer_device: str = "gpu"  # where optimizer states live: gpu, cpu or nvme
    parameter_device: str = "gpu"
    keeps_parameters: bool = False  # FSDP2: gathered parameters stay until backward has used them
    hybrid: bool = False  # FSDP2: sharded over some of the ranks, replicated over the others
    zero: Json = field(default_factory=dict)  # DeepSpeed's settings of ZeRO


@cache
def strategies() -> dict[str, Strategy]:
    """By name. DeepSpeed's are the files in deepspeed_configs/: a new JSON there is a new strategy."""
    fsdp = "train.py", "./launch_fsdp.sh"
    table = [
        Strategy("single", "train.py", "python train.py"),
        Strategy("ddp", "train.py", "./launch_traditional_ddp.sh", ("--strategy=ddp",)),
        Strategy("fsdp", *fsdp, ("--strategy=fsdp",), 3),
        Strategy("fsdp_grad_op", *fsdp, ("--strategy=fsdp", "--reshard_after_forward=False"), 3, keeps_parameters=True),
        Strategy("fsdp_hsdp", *fsdp, ("--strategy=fsdp", "--shard_ranks={half}"), 3, hybrid=True),
        Strategy("fsdp_offload", *fsdp, ("--strategy=fsdp", "--cpu_offload=True"), 3, "cpu", "cpu"),
    ]
    for path in sorted((ROOT / "deepspeed_configs").glob("*_config.json")):
        name = path.name.removesuffix("_config.json")
        launcher = f"./launch_deepspeed_{name}.sh"
        setting, config = f"--deepspeed_config=deepspeed_configs/{path.name}", json.loads(path.read_text())
        stage, optimizer, weights = describe_json(config)
        if not (ROOT / launcher).exists():
            launcher = f"./launch_deepspeed_zero{stage}.sh"
        zero = config.get("zero_optimization", {})
        table.append(Strategy(name, "train_deepspeed.py", launcher, (setting,), stage, optimizer, weights, zero=zero))
    return {strategy.name: strategy for strategy in table}


def find_strategy(name: str) -> Strategy:
    """Raises UserError with the nearest name."""
    if name not in strategies():
        hint = did_you_mean(name, strategies()) or f"; the strategies are {', '.join(strategies())}"
        raise UserError(f"strategy {name!r}: unknown{hint}")
    return strategies()[name]


@dataclass(frozen=True)
class ModelState:
    """Bytes per rank, wherever they live."""

    parameters: float
    gradients: float
    optimizer_states: float

    def total(self) -> float:
        return self.parameters + self.gradients + self.optimizer_states


def model_state_bytes(
    strategy: str, ranks: float, parameters: float, dtype: torch.dtype, fp32_accumulation: bool = True
) -> ModelState:
    """(2 + 2 + K) bytes per parameter, K = 12, divided as the stage says (ZeRO, arXiv:1910.02054, section 3.1).

    ranks: those that share one copy. In fp32 and under autocast (stage 0 and FSDP2), parameters and gradients take 4
    bytes each and Adam's moments 8; DeepSpeed's own fp32 copy of the parameters takes 4 more. fp32_accumulation:
    gradients are accumulated in 4 bytes, which stage 1 keeps in addition to its 2.
    """
    zero = strategy.startswith("zero")
    stage = int(strategy[4]) if zero else 3 if strategy.startswith("fsdp") else 0
    mixed = dtype != torch.float32 and zero and stage > 0
    weights, gradients, states = (2, 2, 12) if mixed else (4, 4, 12 if zero and stage else 8)
    if mixed and fp32_accumulation:
        gradients = 6 if stage == 1 else 4
    partitioned_from = ((weights, 3), (gradients, 2), (states, 1))
    return ModelState(*(parameters * size / (ranks if stage >= first else 1) for size, first in partitioned_from))


def gigabytes(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e9:.4f} GB"


def out_of_memory_advice(
    cfg: TrainConfig, ranks: Ranks, model: GPTConfig, strategy: str, dtype: torch.dtype, reason: str
) -> str:
    parts = ranks.layout.tensor * ranks.layout.pipeline  # into which the model is split, almost evenly
    size, shards = model.parameter_count(), getattr(cfg, "shard_ranks", 0) or ranks.world_size // parts
    state = model_state_bytes(strategy, shards, size / parts, dtype)
    kinds = ", ".join(f"{kind.replace('_', ' ')} {gigabytes(count)}" for kind, count in vars(state).items())
    lines = [reason, f"by formula, the model state per rank under {strategy} is {gigabytes(state.total())}: {kinds}"]
    if ranks.device.type == "cuda":
        others = torch.cuda.max_memory_allocated(ranks.device) - state.total()
        lines.append(f"activations and buffers used up to {gigabytes(max(0, others))} more")
    lines.append("try, in this order (the loss stays the same):")
    if cfg.batch_size > 1:
        factor = next((n for n in (2, 3, 5, 7) if cfg.batch_size % n == 0), cfg.batch_size)
        micro_steps = cfg.gradient_accumulation_steps * factor
        lines.append(f"  --batch_size={cfg.batch_size // factor} --gradient_accumulation_steps={micro_steps}")
    if not cfg.activation_checkpointing:
        lines.append("  --activation_checkpointing=True")
    for name in ("zero1", "zero2", "fsdp", "zero3"):
        less = model_state_bytes(name, ranks.world_size, size, dtype).total()
        if less < state.total():
            lines.append(f"  {strategies()[name].launcher}: {gigabytes(less)}")
    places = {"zero3_offload": "CPU"} if ranks.device.type == "cuda" else {}  # CPU ranks have no other memory
    for name, place in {**places, "zero3_nvme": "disk"}.items():
        if name != strategy and not strategy.endswith("nvme"):
            less = model_state_bytes(name, ranks.world_size, size, dtype).total()
            lines.append(f"  {strategies()[name].launcher}: {gigabytes(less)}, on the {place}")
    return "\n  ".join(lines)
