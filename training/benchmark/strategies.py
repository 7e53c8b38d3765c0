"""Strategies by name: which script trains by it, with which arguments, on how many ranks."""

import dataclasses
import difflib
from dataclasses import dataclass
from pathlib import Path

from training.deepspeed_config import DeepSpeedTrainConfig
from training.errors import UserError
from training.train_config import TrainConfig

CONFIGS = Path("deepspeed_configs")
PEER = "nanogpt"  # a row beside the strategies; see peer.py
OF_TRAIN = {  # the others are the names in deepspeed_configs/; {shard}: ranks that share one copy
    "single": (),
    "ddp": (),
    "fsdp": ("--strategy=fsdp",),
    "fsdp_grad_op": ("--strategy=fsdp", "--reshard_after_forward=False"),
    "fsdp_hsdp": ("--strategy=fsdp", "--shard_ranks={shard}"),
    "fsdp_offload": ("--strategy=fsdp", "--cpu_offload=True"),
}


@dataclass(frozen=True)
class Strategy:
    name: str
    ranks: int
    script: tuple[str, ...]  # with the arguments that make it this strategy

    def takes(self, argument: str) -> bool:
        """Whether its script knows the key: train.py has none of DeepSpeed's."""
        return self.script[0] != "train.py" or argument.lstrip("-").partition("=")[0] not in DEEPSPEEDS


def fields(config: type) -> set[str]:
    return {field.name for field in dataclasses.fields(config)}


DEEPSPEEDS = fields(DeepSpeedTrainConfig) - fields(TrainConfig)


def known() -> list[str]:
    return [*OF_TRAIN, *sorted(path.name.removesuffix("_config.json") for path in CONFIGS.glob("*_config.json"))]


def find(names: list[str], ranks: int) -> list[Strategy]:
    """Raises UserError for a name that is unknown, with the nearest one, or that stands there twice."""
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"--strategies: {twice[0]} stands there twice; keep one")
    return [of(name, ranks) for name in names]


def of(name: str, ranks: int) -> Strategy:
    if name in OF_TRAIN:
        arguments = [argument.format(shard=max(1, ranks // 2)) for argument in OF_TRAIN[name]]
        return Strategy(name, 1 if name == "single" else ranks, ("train.py", *arguments))
    if name not in known():
        near = difflib.get_close_matches(name, known(), n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known())}"
        raise UserError(f"--strategies={name}: unknown; {hint}")
    return Strategy(name, ranks, ("train_deepspeed.py", f"--deepspeed_config={CONFIGS / name}_config.json"))
