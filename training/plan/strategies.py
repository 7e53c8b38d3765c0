"""The strategies that a plan compares: what is partitioned, where it is, how a run of it is started."""

import difflib
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from training import deepspeed_config
from training.benchmark.strategies import OF_TRAIN
from training.deepspeed_rules import dotted
from training.errors import UserError
from training.machine import ROOT
from training.plan.shapes import Shape
from training.train_config import TrainConfig

PLACES = ("device", "host", "nvme")


@dataclass(frozen=True)
class Strategy:
    name: str
    stage: int  # 0: nothing is partitioned; 1: optimizer states; 2: gradients as well; 3: weights as well
    launch: str
    weights: str = "device"  # where each is: one of PLACES
    optimizer: str = "device"  # and the gradients that it needs
    keeps: bool = False  # FSDP2: what was gathered stays until backward is done
    hybrid: bool = False  # partitioned over some of the ranks, replicated over the others

    @property
    def deepspeed(self) -> bool:
        return self.name.startswith("zero")

    @property
    def fsdp(self) -> bool:
        return self.stage == 3 and not self.deepspeed

    @property
    def autocast(self) -> bool:
        """In half precision: weights, norms and the residual stream stay in fp32."""
        return self.stage == 0

    @property
    def offloads(self) -> bool:
        return self.optimizer != "device"


ZERO, FSDP = "./launch_deepspeed_{}.sh", "./launch_fsdp.sh"
STRATEGIES = {
    found.name: found
    for found in (
        Strategy("single", 0, "python train.py"),
        Strategy("ddp", 0, "./launch_traditional_ddp.sh"),
        *(Strategy(f"zero{stage}", stage, ZERO.format(f"zero{stage}")) for stage in range(4)),
        Strategy("fsdp_grad_op", 3, FSDP, keeps=True),
        Strategy("fsdp", 3, FSDP),
        Strategy("fsdp_hsdp", 3, FSDP, hybrid=True),
        Strategy("zero2_offload", 2, ZERO.format("zero2_offload"), optimizer="host"),
        Strategy("zero3_offload", 3, ZERO.format("zero3_offload"), "host", "host"),
        Strategy("fsdp_offload", 3, FSDP, "host", "host"),
        Strategy("zero3_nvme", 3, ZERO.format("zero3_nvme"), "nvme", "nvme"),
    )
}
FLAGS = {name: flags[1:] for name, flags in OF_TRAIN.items()} | {"zero3_nvme": ("--nvme_path=/local_nvme",)}


def named(names: str) -> list[Strategy]:
    """Of a list with commas; UserError with the nearest name where there is none such."""
    found = []
    for name in names.split(","):
        if name not in STRATEGIES:
            near = difflib.get_close_matches(name, STRATEGIES, n=1)
            raise UserError(
                f"strategies: {name!r}: unknown; {f'did you mean {near[0]}? ' if near else ''}"
                f"there are {', '.join(STRATEGIES)}"
            )
        found.append(STRATEGIES[name])
    return found


@dataclass(frozen=True)
class Buffers:
    """DeepSpeed's sizes, in elements, as its JSON has them; in brackets DeepSpeed's own defaults."""

    reduce_bucket: float
    allgather_bucket: float
    overlap: bool
    max_live: float
    sub_group: float
    parameter_buffers: float  # offload_param: buffer_count x buffer_size
    optimizer_buffers: int  # offload_optimizer: buffer_count
    in_host: float  # offload_param: max_in_cpu


@cache
def buffers(strategy: str, shape: Shape, on_gpu: bool) -> Buffers:
    """Of deepspeed_configs/, "auto" filled in as a run would."""
    config: dict[str, Any] = deepspeed_config.read(str(ROOT / f"deepspeed_configs/{strategy}_config.json"))
    for path, value in deepspeed_config.suggested(TrainConfig(), shape.gpt(), config).items():
        if dotted(config, path) == "auto":
            deepspeed_config.put(config, path, value)
    deepspeed_config.adapt(config, torch.device("cuda" if on_gpu else "cpu"))
    zero = config["zero_optimization"]
    param, optimizer = zero.get("offload_param", {}), zero.get("offload_optimizer", {})
    return Buffers(
        zero.get("reduce_bucket_size", 5e8),
        zero.get("allgather_bucket_size", 5e8),
        bool(zero.get("overlap_comm")),
        zero.get("stage3_max_live_parameters", 1e9),
        zero.get("sub_group_size", 1e9),
        param.get("buffer_count", 5) * param.get("buffer_size", 1e8) if param.get("device") == "nvme" else 0,
        optimizer.get("buffer_count", 4) if optimizer.get("device") == "nvme" else 0,
        param.get("max_in_cpu", 1e9) if param.get("device") == "nvme" else 0,
    )
