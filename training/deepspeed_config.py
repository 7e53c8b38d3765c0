"""DeepSpeed's JSON: literals become settings; "auto" is resolved as in the Hugging Face Trainer; checks."""

import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from model import GPTConfig
from training.config import Setting, TrainConfig, key
from training.deepspeed_json import BATCH, SEND_LESS, Json, check_keys, dotted, put, read
from training.distributed import Layout, Ranks, local_world_size, pick_dtype, world_size
from training.errors import ConfigError, count, list_problems
from training.optim import make_optimizer

DTYPES = {"bf16": "bfloat16", "fp16": "float16"}
SENT_DTYPES = {**DTYPES, "fp32": "float32"}
# Values of the JSON that are a setting of ours.
FROM_SETTINGS = {
    "gradient_clipping": "grad_clip",
    "optimizer.params.lr": "learning_rate",
    "optimizer.params.weight_decay": "weight_decay",
}


@dataclass(frozen=True)
class DeepSpeedTrainConfig(TrainConfig):
    deepspeed_config: str = key("deepspeed_configs/zero2_config.json", "DeepSpeed's own settings", "DeepSpeed")
    nvme_path: str = key("", "folder on a local NVMe disk of each node, for NVMe offload; empty: the JSON's nvme_path")
    tensor_parallel: int = key(1, "ranks of a node that share each matrix")
    tensor_across_nodes: bool = key(False, "let ranks of several nodes share matrices, over their slow links")
    pipeline_parallel: int = key(1, "stages of consecutive blocks, each on other ranks; with ZeRO-1")
    expert_parallel: int = key(1, "data-parallel ranks that share the experts of an MoE model")
    verbose: bool = key(False, "print DeepSpeed's messages instead of writing them to out_dir/deepspeed.log")

    @classmethod
    def inherited(cls, values: dict[str, Any], places: dict[str, str]) -> Iterator[Setting]:
        """Literals of the JSON replace defaults and the settings of a resumed run."""
        by_user = set(places)
        yield from super().inherited(values, places)  # `parse` adds them to values and places
        path = values["deepspeed_config"]
        config = read(path)
        for name, value, place in (*literals(config), *literal_batch(config, values, places, by_user)):
            if value not in (None, "auto"):
                yield name, value, f"{path}: {place}"


def literals(config: Json) -> Iterator[Setting]:
    """(setting, value, path in the JSON) of what the JSON says about our settings, except the batch size."""
    for path, setting in FROM_SETTINGS.items():
        yield setting, dotted(config, path), path
    betas = dotted(config, "optimizer.params.betas")
    if isinstance(betas, list) and len(betas) == 2:
        yield from (("beta1", betas[0], "optimizer.params.betas"), ("beta2", betas[1], "optimizer.params.betas"))
    if "activation_checkpointing" in config:
        yield "activation_checkpointing", True, "activation_checkpointing"
    yield "grad_dtype", SENT_DTYPES.get(config.get("communication_data_type", "")), "communication_data_type"
    enabled = {block: dotted(config, f"{block}.enabled") for block in DTYPES}
    if False in enabled.values() and not any(enabled.values()):
        yield "dtype", "float32", "bf16.enabled, fp16.enabled"
    yield from (("dtype", DTYPES[block], f"{block}.enabled") for block, given in enabled.items() if given is True)


def literal_batch(config: Json, values: Json, places: Json, by_user: set[str]) -> Iterator[Setting]:
    """The user's settings come first, then the JSON's literals, then DeepSpeed's rule: one micro-step per rank.

    A total alone is divided by a resumed run's batch_size. `fill_batch` reports a total that is not reached.
    """
    total, micro, steps = (0 if n in (None, "auto") else n for n in map(config.get, BATCH))
    split = values["tensor_parallel"] * values["sequence_parallel"] * values["pipeline_parallel"]
    ranks = max(1, world_size() // max(1, split))
    batch_size = values["batch_size"] if "batch_size" in by_user else micro
    micro_steps = values[BATCH[2]] if BATCH[2] in by_user else steps * ranks  # of all ranks
    if total and micro_steps:
        batch_size = batch_size or max(1, total // micro_steps)
    elif total:
        batch_size = batch_size or (values["batch_size"] if "batch_size" in places else max(1, total // ranks))
        micro_steps = max(1, total // (batch_size * ranks)) * ranks
    elif micro == batch_size > 0 and BATCH[2] not in places:
        micro_steps = micro_steps or ranks
    yield from (("batch_size", batch_size or None, "batch size"), (BATCH[2], micro_steps or None, "batch size"))


def describe_json(config: Json) -> tuple[int, str, str]:
    """(ZeRO stage, device of the optimizer states, device of the parameters); devices: gpu, cpu, nvme."""
    devices = [dotted(config, f"zero_optimization.offload_{part}.device") for part in ("optimizer", "param")]
    optimizer, parameters = (device if device in ("cpu", "nvme") else "gpu" for device in devices)
    return dotted(config, "zero_optimization.stage") or 0, optimizer, parameters


def strategy_of(config: Json) -> str:
    """The strategy's name: zero0 ... zero3, followed by _offload (to the CPU), _nvme or _hpz."""
    stage, *devices = describe_json(config)
    if dotted(config, "zero_optimization.zero_hpz_partition_size") not in (None, 0, 1):
        return f"zero{stage}_hpz"
    return f"zero{stage}" + ("_nvme" if "nvme" in devices else "_offload" if "cpu" in devices else "")


def resolve(cfg: DeepSpeedTrainConfig, ranks: Ranks, model: GPTConfig, config: Json) -> tuple[Json, torch.dtype]:
    """The JSON that deepspeed.initialize gets, and the run's dtype. Raises ConfigError with every problem."""
    config, problems = json.loads(json.dumps(config)), []
    # An AdamW block applies only if training/optim.py builds AdamW, too.
    if type(make_optimizer(torch.nn.Linear(1, 1), cfg)) is not torch.optim.AdamW:
        config.pop("optimizer", None)
    dtype = pick_dtype(cfg.dtype, ranks.device)
    for path, (value, source) in automatic(cfg, model, config, dtype).items():
        given = dotted(config, path)
        if given == "auto" or (given is None and source):
            put(config, path, value)
        elif given != value and source:
            problems.append(f'{path} = {json.dumps(given)}: contradicts {source} in the settings; write "auto"')
    problems += fill_batch(config, cfg, ranks)
    adapt(config, ranks.device)
    if cfg.optimizer == "muon":
        config.setdefault("zero_optimization", {})["reduce_scatter"] = False  # each rank needs whole matrices
    problems += (problem for _, problem in check_keys(config, auto=False))
    problems += check_blocks(config, cfg, ranks)
    problems += check_offload(config, cfg, model, ranks)
    if ranks.layout != Layout():
        from training import deepspeed_parallel

        problems += deepspeed_parallel.check(cfg, ranks, model, strategy_of(config))
        config |= deepspeed_parallel.json_blocks(model, ranks.layout)
    if problems:
        raise ConfigError(list_problems(problems, f"in {cfg.deepspeed_config}"))
    for block in nvme_blocks(config):
        block["nvme_path"] = str(swap_folder(cfg.nvme_path or block["nvme_path"], cfg))
    return config, dtype


def automatic(cfg: TrainConfig, model: GPTConfig, config: Json, dtype: torch.dtype) -> dict[str, tuple[Any, str]]:
    """path -> (value, the setting that decides it, for messages), whether or not the JSON has the key.

    Where no setting decides it (""), the value is that of Hugging Face's formulas, and replaces "auto" only.
    """
    name = str(dtype).removeprefix("torch.")
    values: dict[str, tuple[Any, str]] = {
        path: (getattr(cfg, setting), f"{setting} = {getattr(cfg, setting)}")
        for path, setting in FROM_SETTINGS.items()
        if "optimizer" in config or not path.startswith("optimizer.")
    }
    # Without ZeRO, DeepSpeed's bf16 accumulates gradients in bf16 and skips the first update; train.py uses autocast.
    half_without_zero = dtype != torch.float32 and not dotted(config, "zero_optimization.stage")
    autocast = half_without_zero or dotted(config, "torch_autocast.enabled") is True
    if autocast:
        values["torch_autocast.enabled"] = True, f"dtype = {name} under ZeRO-0"
        values["torch_autocast.dtype"] = name, f"dtype = {name}"
    for block, its_dtype in DTYPES.items():
        if autocast and its_dtype == name:  # in the place of the engine's own
            put(config, f"{block}.enabled", "auto")
        values[f"{block}.enabled"] = its_dtype == name and not autocast, f"dtype = {name}"
    if "optimizer" in config:
        values["optimizer.params.betas"] = [cfg.beta1, cfg.beta2], f"beta1 = {cfg.beta1}, beta2 = {cfg.beta2}"
    if dotted(config, "activation_checkpointing.contiguous_memory_optimization"):
        values["activation_checkpointing.number_checkpoints"] = model.n_layer, f"n_layer = {model.n_layer}"
    if sent := [short for short, name in SENT_DTYPES.items() if name == cfg.grad_dtype]:  # not auto
        values["communication_data_type"] = sent[0], f"grad_dtype = {cfg.grad_dtype}"
    return values | {
        "zero_optimization.zero_hpz_partition_size": (local_world_size(), ""),
        "optimizer.params.eps": (1e-8, ""),  # the default of every AdamW
        "zero_optimization.reduce_bucket_size": (model.n_embd**2, ""),
        "zero_optimization.stage3_prefetch_bucket_size": (int(0.9 * model.n_embd**2), ""),
        "zero_optimization.stage3_param_persistence_threshold": (10 * model.n_embd, ""),
        "scheduler.params.warmup_min_lr": (0, ""),
        "scheduler.params.warmup_max_lr": (cfg.learning_rate, ""),
        "scheduler.params.warmup_num_steps": (max(1, cfg.warmup_iters), ""),
        "scheduler.params.total_num_steps": (cfg.max_iters, ""),
    }


def fill_batch(config: Json, cfg: TrainConfig, ranks: Ranks) -> Iterator[str]:
    """Fill in the numbers of BATCH; yields the problem if a literal contradicts them."""
    steps, sequences = cfg.gradient_accumulation_steps // ranks.data_size, cfg.batch_size * ranks.data_size
    values = dict(zip(BATCH, (sequences * steps, cfg.batch_size, steps), strict=True))
    wrong = {name: config[name] for name in BATCH if config.get(name) not in (None, "auto", values[name])}
    product = f"{count(steps, 'micro-step')} x {count(ranks.data_size, 'rank')} = {sequences * steps}"
    problem = ", ".join(f"{name} = {json.dumps(value)}" for name, value in wrong.items())
    if wrong and list(wrong) != ["train_batch_size"]:
        accumulation = f"gradient_accumulation_steps = {cfg.gradient_accumulation_steps} is the total over all ranks"
        yield f'{problem}: contradicts batch_size = {cfg.batch_size} x {product} ({accumulation}); write "auto"'
    elif wrong:
        given = wrong["train_batch_size"]
        reachable = config.get(BATCH[2]) == steps and given % sequences == 0
        fix = f'"gradient_accumulation_steps": {given // sequences}' if reachable else sequences * steps
        yield f"{problem}: is not {count(cfg.batch_size, 'sequence')} x {product}; write {fix}"
    config.update(values)
    if ranks.data_size < ranks.world_size:
        del config["train_batch_size"]  # DeepSpeed would count all ranks


def adapt(config: Json, device: torch.device) -> None:
    if device.type == "cpu":  # which has no second stream; ZeRO-2 goes from 0.90 to 1.02 of DDP's speed
        config.get("zero_optimization", {})["overlap_comm"] = False
    config.get("scheduler", {}).setdefault("params", {})
    config.setdefault("timers", {"throughput": {"enabled": False}})  # waits for the device; metrics.jsonl has it
    config["zero_allow_untested_optimizer"] = True  # any optimizer of training/optim.py
    config["zero_force_ds_cpu_optimizer"] = False  # torch's optimizers may be offloaded
    params = config.get("optimizer", {}).setdefault("params", {})
    if describe_json(config)[1] == "gpu":  # one kernel, like FusedAdam, which needs a CUDA compiler
        params.setdefault("torch_adam", True)
    if params.get("torch_adam"):
        params.setdefault("fused", True)


def nvme_blocks(config: Json) -> list[Json]:
    blocks = [dotted(config, f"zero_optimization.offload_{part}") or {} for part in ("optimizer", "param")]
    return [block for block in blocks if block.get("device") == "nvme"]


def swap_folder(disk: str, cfg: TrainConfig) -> Path:
    """A run's own folder on an NVMe disk; the checksum distinguishes run folders of the same name."""
    path = Path(cfg.out_dir, "eval" if cfg.eval_only else "").absolute()  # while a run is evaluated, it may go on
    return Path(disk) / f"{path.name}-{zlib.crc32(os.fsencode(path)):08x}"


def check_blocks(config: Json, cfg: TrainConfig, ranks: Ranks) -> Iterator[str]:
    on_cpu, partitioned = ranks.device.type == "cpu", dotted(config, "zero_optimization.stage")
    if dotted(config, "fp16.enabled") and on_cpu and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        yield 'fp16.enabled = true: not supported by this CPU; write "bf16": {"enabled": true} instead'
    if dotted(config, "torch_autocast.dtype") == "float16" and partitioned:
        yield "torch_autocast.dtype = 'float16': under ZeRO, DeepSpeed clips scaled gradients; use fp16 instead"
    optimizer = dotted(config, "optimizer.type")
    if optimizer in ("OneBitAdam", "OneBitLamb", "ZeroOneAdam"):
        yield f"optimizer.type = {optimizer!r}: DeepSpeed has removed it; write AdamW ({SEND_LESS})"
    elif "optimizer" in config and optimizer not in ("Adam", "AdamW"):
        yield f"optimizer.type = {optimizer!r}: must be AdamW; another optimizer goes to training/optim.py"
    if dotted(config, "optimizer.params.adam_w_mode") is False:
        yield "optimizer.params.adam_w_mode = false: selects Adam with L2 regularization, not AdamW; remove it"
    if dotted(config, "optimizer.params.fused") is not None and not dotted(config, "optimizer.params.torch_adam"):
        yield 'optimizer.params.fused: is a setting of torch\'s AdamW; write "torch_adam": true, or remove it'
    if cfg.optimizer == "muon" and partitioned:
        yield from check_muon(config, cfg)
    zero = config.get("zero_optimization", {})
    for name in ("zero_quantized_weights", "zero_quantized_gradients"):
        if zero.get(name) and on_cpu:
            yield f"zero_optimization.{name} = true: DeepSpeed quantizes on GPUs only; remove it, or train on GPUs"
    near = zero.get("zero_hpz_partition_size", 1)
    if type(near) is int and ranks.world_size % max(1, near):
        rule = f"must divide the number of ranks, {ranks.world_size}"
        yield f'zero_optimization.zero_hpz_partition_size = {near}: {rule}; write "auto", which is the ranks of a node'
    block = config.get("activation_checkpointing", {})
    if block and not cfg.activation_checkpointing:
        yield "activation_checkpointing: contradicts activation_checkpointing = False in the settings; remove the block"
    offloaded = block.get("cpu_checkpointing") and on_cpu
    if (block.get("contiguous_memory_optimization") or offloaded) and not block.get("partition_activations"):
        yield "activation_checkpointing: what is switched on needs partition_activations = true"


def check_muon(config: Json, cfg: TrainConfig) -> Iterator[str]:
    if cfg.grad_clip:
        yield f"grad_clip = {cfg.grad_clip}: with optimizer = muon, DeepSpeed would clip the update; set --grad_clip=0"
    if describe_json(config)[1:] != ("gpu", "gpu"):
        yield "zero_optimization: with optimizer = muon, nothing can be offloaded; use --optimizer=adamw"
    if dotted(config, "fp16.enabled"):
        yield "fp16.enabled = true: Muon's momentum would depend on the loss scale; use --dtype=bfloat16"
    if "scheduler" in config:
        yield "scheduler: would give Muon the learning rate of AdamW; remove it to use ours"


def check_offload(config: Json, cfg: DeepSpeedTrainConfig, model: GPTConfig, ranks: Ranks) -> Iterator[str]:
    stage, *devices = describe_json(config)
    for part, device in zip(("optimizer", "param"), devices, strict=True):
        name = f"zero_optimization.offload_{part}"
        lowest = 3 if device == "nvme" or part == "param" else 1
        if device != "gpu" and stage < lowest:
            yield f"{name}.device = {device!r}: needs stage {lowest}, stage is {stage}; set it, or remove the block"
        elif device == "nvme":
            block = dotted(config, name)
            disk = cfg.nvme_path or block.get("nvme_path", "")
            if not os.path.isdir(disk):  # noqa: PTH112 (Path raises for too long a name)
                yield f"{name}.nvme_path = {disk!r}: no such folder; set --nvme_path to one on a local NVMe disk"
            largest = -(-model.vocab_size * model.n_embd // ranks.world_size)
            if part == "param" and (size := block.get("buffer_size", 100_000_000)) < largest:
                yield f"{name}.buffer_size = {size}: must be at least {largest}, a rank's largest part"


def check_values(config: Json, parse: type, path: str) -> None:
    """Let DeepSpeed check the values inside its blocks; parse: deepspeed.DeepSpeedConfig. Raises ConfigError."""
    problems: list[str] = []
    for name in (*config, ""):  # block by block, because DeepSpeed stops at the first that it rejects; then the whole
        try:
            parse({**{key: config[key] for key in BATCH if key in config}, name: config[name]} if name else config)
        except Exception as error:
            for problem in error.errors() if name and hasattr(error, "errors") else ():  # pydantic's
                place = ".".join(dict.fromkeys([name, *map(str, problem["loc"])]))
                problems.append(f"{place} = {problem['input']!r:.80}: {problem['msg']}")
            if not (name or problems):
                problems.append(str(error).partition("\n")[0])
    if scheduler := dotted(config, "scheduler.type"):
        make = getattr(import_module("deepspeed.runtime.lr_schedules"), scheduler)
        try:
            make(torch.optim.AdamW([torch.zeros(1)]), **config["scheduler"]["params"]).step()
        except Exception as error:
            problems.append(f"scheduler.params: {error}")
    if problems:
        raise ConfigError(list_problems(problems, f"in {path}"))
