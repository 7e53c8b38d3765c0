"""What a run with given settings needs of its hosts: bytes in which place, and compiled ops."""

from dataclasses import dataclass, replace

import torch

from data.dataset import open_dataset
from data.errors import DataError
from model import GPTConfig
from training.batches import DATA
from training.deepspeed_config import DeepSpeedTrainConfig, Json
from training.deepspeed_ops import needed
from training.deepspeed_rules import dotted
from training.errors import ConfigError
from training.memory import model_state

SAVED = 16  # bytes a parameter in a checkpoint: the weights, their fp32 copy, two moments
PROCESS = 1_000_000_000  # bytes of a rank's Python, torch and DeepSpeed, and of a small model's activations
GPT2 = {"gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024), "gpt2-large": (36, 20, 1280), "gpt2-xl": (48, 25, 1600)}
GPT2_IDS = 50257  # in its vocabulary: what is counted with where the data set is not here


@dataclass(frozen=True)
class Need:
    """Of a run on `ranks` ranks, of all hosts together; without settings nothing is known: parameters is 0."""

    cfg: DeepSpeedTrainConfig
    stage: int
    offload: dict[str, str]  # "optimizer", "param" -> "cpu" or "nvme"
    nvme: str  # folder, if one is needed
    ops: tuple[str, ...]
    parameters: int
    ranks: int
    hosts: int

    def state(self, place: str) -> int:
        """Bytes of a rank's model state on the "device", in the memory of the host ("cpu"), or on "nvme"."""
        held = model_state(f"zero{self.stage}", self.ranks, self.parameters, torch.float32)  # bf16 stays below it
        optimizer = self.offload.get("optimizer", "device")
        gradients = "device" if optimizer == "device" else "cpu"  # where they are summed up for it
        weights = self.offload.get("param", "device")
        parts = ((weights, held.weights), (gradients, held.gradients), (optimizer, held.optimizer_states))
        return round(sum(size for where, size in parts if where == place))

    def checkpoint(self) -> int:
        return SAVED * self.parameters

    def kept(self) -> int:
        """Bytes of out_dir at most: the newest checkpoints, the best, and the one that is being written."""
        return (self.cfg.keep_checkpoints + 2) * self.checkpoint()

    def written(self, ranks: int) -> int:
        """Bytes of a checkpoint that a host with so many of the ranks writes; without ZeRO, rank 0 writes it all."""
        return self.checkpoint() * ranks // self.ranks if self.stage else self.checkpoint()

    def gradients(self) -> int:
        """Bytes that each rank sends through an all-reduce in a step, as fp32."""
        return 4 * self.parameters


def of(cfg: DeepSpeedTrainConfig, config: Json, ranks: int, hosts: int, known: bool) -> Need:
    """known: whether there are settings at all."""
    stage = dotted(config, "zero_optimization.stage") or 0
    if stage not in (0, 1, 2, 3):
        raise ConfigError(f"zero_optimization.stage = {stage!r}: must be 0, 1, 2 or 3")
    zero = config.get("zero_optimization", {})
    devices = {what: dotted(zero, f"offload_{what}.device") for what in ("optimizer", "param")}
    offload = {what: device for what, device in devices.items() if device in ("cpu", "nvme")}
    paths = [dotted(zero, f"offload_{what}.nvme_path") for what, device in offload.items() if device == "nvme"]
    nvme = cfg.nvme_path or next(filter(None, paths), "/local_nvme") if paths else ""
    parameters = model(cfg).parameter_count() if known else 0
    return Need(cfg, stage, offload, nvme, tuple(needed(config, "cpu")), parameters, ranks, hosts)


def model(cfg: DeepSpeedTrainConfig) -> GPTConfig:
    """The shape that the run will have, as far as it can be told without loading anything."""
    try:
        ids = open_dataset(DATA / cfg.dataset).vocab_size
    except DataError:
        ids = GPT2_IDS
    shape = cfg.model_config(ids)
    if cfg.init_from not in GPT2:
        return shape
    n_layer, n_head, n_embd = GPT2[cfg.init_from]
    return replace(shape, n_layer=n_layer, n_head=n_head, n_embd=n_embd, bias=True)
