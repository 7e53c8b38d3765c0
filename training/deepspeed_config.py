"""DeepSpeed's JSON: read, "auto" filled in from the settings, and whatever contradicts them refused.

"auto" has the meaning that the Hugging Face Trainer gives it, so that the same files work there.
"""

import difflib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils import cpp_extension

from model import GPTConfig
from training import nvme
from training.config import Problem, key
from training.deepspeed_rules import check, dotted
from training.distributed import Ranks
from training.errors import ConfigError, listed
from training.train_config import TrainConfig

Json = dict[str, Any]
SETTINGS = {
    "train_micro_batch_size_per_gpu": "batch_size",
    "gradient_clipping": "grad_clip",
    "optimizer.params.lr": "learning_rate",
    "optimizer.params.weight_decay": "weight_decay",
}
EPSILON = 1e-8  # of AdamW; torch's default, which train.py has too


@dataclass(frozen=True)
class DeepSpeedTrainConfig(TrainConfig):
    """The settings of train.py, and where those are that DeepSpeed owns."""

    deepspeed_config: str = key(
        "deepspeed_configs/zero2_config.json", "DeepSpeed's own settings: ZeRO stage, offload, buckets ...", "DeepSpeed"
    )
    nvme_path: str = key("", "folder on an NVMe disk of each node for what is offloaded there; empty: the JSON's")
    verbose: bool = key(False, "let DeepSpeed say all that it has to say")

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if not self.deepspeed_config:
            yield "deepspeed_config", "must not be empty; name a JSON file"


def arguments(argv: list[str]) -> list[str]:
    """DeepSpeed's launcher and its users write some arguments in forms of their own: bring them to --key=value."""
    given, found = iter(a for a in argv if a != "--deepspeed" and not a.startswith("--local_rank")), []
    for argument in given:
        if argument == "--deepspeed_config":
            argument += f"={next(given, '')}"
        found.append(argument)
    return found


def read(name: str) -> Json:
    """Raises ConfigError for a file that is missing, or no JSON, or says a thing twice."""
    path = Path(name)
    if not path.is_file():
        near = difflib.get_close_matches(str(path), sorted(map(str, path.parent.glob("*.json"))), n=1)
        hint = f"; did you mean {near[0]}?" if near else "; those that come with this code are in deepspeed_configs/"
        raise ConfigError(f"deepspeed_config = {name!r}: no such file{hint}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=once)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}: is not JSON ({error.msg}); comments are not allowed there") from None
    except ValueError as error:  # a key twice, or no UTF-8
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: must be an object, with {{ and }} around it")
    return config


def once(pairs: list[tuple[str, Any]]) -> Json:
    """DeepSpeed refuses a key that stands in a block twice, too."""
    names = [name for name, _ in pairs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{twice[0]} stands there twice; keep one")
    return dict(pairs)


def wanted_dtype(cfg: DeepSpeedTrainConfig, config: Json) -> str:
    """dtype = auto leaves the choice to a JSON that has made it."""
    if cfg.dtype == "auto":
        for block, dtype in (("bf16", "bfloat16"), ("fp16", "float16")):
            if dotted(config, f"{block}.enabled") is True:
                return dtype
    return cfg.dtype


def strategy_of(config: Json) -> str:
    """zero0 ... zero3, with _offload (to the CPU) or _nvme behind it."""
    zero = config.get("zero_optimization", {})
    devices = {dotted(zero, f"offload_{what}.device") for what in ("optimizer", "param")}
    return f"zero{zero.get('stage', 0)}" + ("_nvme" if "nvme" in devices else "_offload" if "cpu" in devices else "")


def resolve(cfg: DeepSpeedTrainConfig, ranks: Ranks, model: GPTConfig, config: Json, dtype: torch.dtype) -> Json:
    """What DeepSpeed is given: no "auto" is left. Raises ConfigError with every problem."""
    config, problems = json.loads(json.dumps(config)), []
    for path, (value, owner) in owned(cfg, ranks, config, dtype).items():
        found = dotted(config, path)
        if found in (None, "auto"):
            put(config, path, value)
        elif found != value:
            fix = "".join(f", or set {setting}" for setting in fixes(cfg, ranks, path, found))
            problems.append(f'{path} = {json.dumps(found)}: contradicts {owner}; write "auto"{fix}')
    for path, value in suggested(cfg, model, config).items():
        if dotted(config, path) == "auto":
            put(config, path, value)
    nvme.take_disk(config, cfg.nvme_path)
    adapt(config, ranks.device)
    problems += check(config, cfg, model, ranks)
    if problems:
        raise ConfigError(listed(problems, f"in {cfg.deepspeed_config}"))
    nvme.take_own(config, cfg.out_dir)
    return config


def fixes(cfg: TrainConfig, ranks: Ranks, path: str, found: Any) -> Iterator[str]:
    """The settings that would agree with the JSON, or come nearest to it."""
    if path in SETTINGS:
        yield f"--{SETTINGS[path]}={found}"
    elif path == "gradient_accumulation_steps" and isinstance(found, int):
        yield f"--gradient_accumulation_steps={found * ranks.world_size}"
    elif path == "train_batch_size" and isinstance(found, int):
        least = cfg.batch_size * ranks.world_size  # sequences in a step of one micro-step a rank
        for near in sorted({found // least * least, -(-found // least) * least} - {0}):
            yield f"--gradient_accumulation_steps={near // cfg.batch_size} (for {near})"


def owned(cfg: TrainConfig, ranks: Ranks, config: Json, dtype: torch.dtype) -> dict[str, tuple[Any, str]]:
    """path -> (value, where it comes from): what the settings decide, whether the JSON says so or not."""
    micro_steps = cfg.gradient_accumulation_steps // ranks.world_size
    per_step = cfg.batch_size * cfg.gradient_accumulation_steps
    identity = (
        f"batch_size = {cfg.batch_size} x {micro_steps} micro-steps x {ranks.world_size} ranks = {per_step} "
        f"(gradient_accumulation_steps = {cfg.gradient_accumulation_steps} are those of all ranks)"
    )
    name = str(dtype).removeprefix("torch.")
    values: dict[str, tuple[Any, str]] = {
        "train_micro_batch_size_per_gpu": (cfg.batch_size, identity),
        "gradient_accumulation_steps": (micro_steps, identity),
        "train_batch_size": (per_step, identity),
        "gradient_clipping": (cfg.grad_clip, f"grad_clip = {cfg.grad_clip}"),
    }
    # Without ZeRO, DeepSpeed's own bf16 accumulates in bf16 and skips the first update; autocast is what train.py has.
    without_zero = not dotted(config, "zero_optimization.stage") and dtype == torch.bfloat16
    if autocast := bool(without_zero or dotted(config, "torch_autocast.enabled")):
        values["torch_autocast.enabled"] = True, f"dtype = {name} under ZeRO-0"
        values["torch_autocast.dtype"] = name, f"dtype = {name}"
    values["bf16.enabled"] = dtype == torch.bfloat16 and not autocast, f"dtype = {name}"
    values["fp16.enabled"] = dtype == torch.float16 and not autocast, f"dtype = {name}"
    if "optimizer" in config:
        values["optimizer.params.lr"] = cfg.learning_rate, f"learning_rate = {cfg.learning_rate}"
        values["optimizer.params.betas"] = [cfg.beta1, cfg.beta2], f"beta1 = {cfg.beta1}, beta2 = {cfg.beta2}"
        values["optimizer.params.eps"] = EPSILON, f"train.py's eps = {EPSILON}"
        values["optimizer.params.weight_decay"] = cfg.weight_decay, f"weight_decay = {cfg.weight_decay}"
    return values


def suggested(cfg: TrainConfig, model: GPTConfig, config: Json) -> Json:
    """path -> value where the JSON says "auto"; a value there is right as it is."""
    values = {"zero_optimization.reduce_bucket_size": model.n_embd**2}
    if dotted(config, "zero_optimization.stage") == 3:
        values["zero_optimization.stage3_prefetch_bucket_size"] = int(0.9 * model.n_embd**2)
        values["zero_optimization.stage3_param_persistence_threshold"] = 10 * model.n_embd
    return {
        **values,
        "scheduler.params.warmup_min_lr": 0,
        "scheduler.params.warmup_max_lr": cfg.learning_rate,
        "scheduler.params.warmup_num_steps": max(1, cfg.warmup_iters),
        "scheduler.params.total_num_steps": cfg.max_iters,
    }


def adapt(config: Json, device: torch.device) -> None:
    """To the machine: a CPU has no second stream to reduce on; where no nvcc is, FusedAdam cannot be compiled."""
    if device.type == "cpu" and (zero := config.get("zero_optimization", {})).get("overlap_comm") != "auto":
        zero["overlap_comm"] = False  # 0.90 -> 1.02 of DDP's speed for ZeRO-2
    params = config.get("optimizer", {}).get("params", {})
    offloaded = dotted(config, "zero_optimization.offload_optimizer.device") in ("cpu", "nvme")
    if "optimizer" in config and not offloaded and (device.type == "cpu" or cpp_extension.CUDA_HOME is None):
        params.setdefault("torch_adam", True)
    if params.get("torch_adam"):
        params.setdefault("fused", True)
    if params.get("torch_adam") or "optimizer" not in config:
        config["zero_force_ds_cpu_optimizer"] = False  # torch's AdamW may be offloaded, too


def put(config: Json, path: str, value: Any) -> None:
    *blocks, name = path.split(".")
    for block in blocks:
        config = config.setdefault(block, {})
    config[name] = value
