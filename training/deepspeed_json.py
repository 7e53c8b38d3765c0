"""DeepSpeed's JSON by itself: its syntax, its keys, and the kinds of their values."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.errors import JSON_TYPES, did_you_mean
from training.errors import ConfigError, list_problems

Json = dict[str, Any]
COMMENT = re.compile(r'("(?:\\.|[^"\\])*")|//[^\n]*|/\*.*?\*/', re.DOTALL)  # or a string, which may hold // itself
# The first is the product of the other two and the number of ranks.
BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
DTYPES = ("fp32", "fp16", "bf16")
# Each key with a value of its kind: the lowest number, or a tuple of all values. DeepSpeed ignores other keys in these
# blocks and fails late on values of another kind, but in empty ones it checks both (see deepspeed_config.check_values).
KEYS: Json = {
    **dict(bf16={}, comms_logger={}, compile={}, csv_monitor={}, fp16={}, tensorboard={}, wandb={}),
    **dict(dump_state=True, memory_breakdown=True, prescale_gradients=True, wall_clock_breakdown=True),
    **dict(zero_allow_untested_optimizer=True, zero_force_ds_cpu_optimizer=True, communication_data_type=DTYPES),
    **{**dict.fromkeys((*BATCH, "steps_per_print"), 1), "gradient_clipping": 0.0, "gradient_predivide_factor": 0.0},
    **dict(gradient_allreduce_op=("mean", "sum"), log_level=("debug", "info", "warning", "error", "critical")),
    "activation_checkpointing": {
        **dict(partition_activations=True, contiguous_memory_optimization=True, cpu_checkpointing=True),
        **dict(synchronize_checkpoint_boundary=True, profile=True, number_checkpoints=1),
    },
    "aio": dict(
        block_size=1, queue_depth=1, intra_op_parallelism=1, single_submit=True, overlap_events=True, use_gds=True
    ),
    "checkpoint": dict(tag_validation="Warn", parallel_write={}),
    "data_types": dict(grad_accum_dtype=DTYPES, param_dtype=DTYPES, buffer_dtype=DTYPES, keep_in_fp32_modules=[]),
    "flops_profiler": {
        **dict(enabled=True, detailed=True, profile_step=0, module_depth=-1, top_modules=1),
        **dict(recompute_fwd_factor=0.0, output_file="flops.txt"),
    },
    "optimizer": {
        **dict(type="AdamW", legacy_fusion=True),
        "params": {
            **dict(lr=0.0, betas=[0.9, 0.95], eps=0.0, weight_decay=0.0),
            **dict(torch_adam=True, fused=True, adam_w_mode=True, fp32_optimizer_states=True),
        },
    },
    "scheduler": dict(type=("LRRangeTest", "OneCycle", "WarmupLR", "WarmupDecayLR", "WarmupCosineLR"), params={}),
    "timers": dict(throughput=dict(enabled=True, synchronized=True)),
    "torch_autocast": dict(enabled=True, dtype="bfloat16"),
    "zero_optimization": {  # DeepSpeed checks the other keys; these are read before
        "stage": (0, 1, 2, 3),
        "offload_optimizer": dict(device="cpu", nvme_path="/nvme"),
        "offload_param": dict(device="cpu", nvme_path="/nvme", buffer_size=0.0),
    },
}
KIND_NAMES = JSON_TYPES | {tuple: "one of {}", int: "an integer, {} or more", float: "a number, {} or more"}
PARALLEL = {"tensor_parallel": "tensor_parallel", "pipeline": "pipeline_parallel", "expert_parallel": "expert_parallel"}
PARALLEL |= {"sequence_parallel_size": "sequence_parallel", "data_parallel_size": "sequence_parallel"}
# Keys that this code does not support, with the reason, and what to use.
SEND_LESS = 'set "communication_data_type": "bf16" to send less'
UNSUPPORTED = {
    "gradient_checkpointing": "as DeepSpeed has no such key (set --activation_checkpointing=True)",
    **{name: f"as it follows from the model (set --{key}=N)" for name, key in PARALLEL.items()},
    "compression_training": f"as DeepSpeed has removed it ({SEND_LESS})",
    "data_efficiency": "as batches are the same under every strategy",
    "autotuning": "as it starts runs without this code's settings",
    "checkpoint.load_universal": "as it runs code in the files (any strategy resumes any checkpoint without it)",
    "checkpoint.use_node_local_storage": "as the nodes would overwrite each other's files in out_dir",
    "wandb.enabled": "as this code logs itself (set --wandb_log=True)",
    "zero_optimization.cpu_offload": 'as it is an old key (write "offload_optimizer": {"device": "cpu"})',
    "zero_optimization.cpu_offload_param": 'as it is an old key (write "offload_param": {"device": "cpu"})',
    "zero_optimization.elastic_checkpoint": "as its files cannot be resumed (any number of ranks resumes all others)",
    "zero_optimization.mics_shard_size": "as DeepSpeed has removed it (use train.py --strategy=fsdp --shard_ranks=N)",
}


def read(name: str) -> Json:
    """Raises ConfigError for a missing file, invalid JSON, or values of a wrong kind."""
    path = Path(name)
    if not path.is_file():
        known = sorted(map(str, path.parent.glob("*.json")))
        hint = did_you_mean(str(path), known) or "; deepspeed_configs/ has one for each strategy"
        raise ConfigError(f"deepspeed_config = {name!r}: no such file{hint}")
    try:
        text = COMMENT.sub(lambda match: match[1] or "\n" * match[0].count("\n"), path.read_text(encoding="utf-8"))
        config = json.loads(text, object_pairs_hook=unique_keys)
        if not isinstance(config, dict):
            raise ValueError("the file must be an object, {...}")
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}: not valid JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:  # one of ours, not UTF-8, or nested too deeply
        raise ConfigError(f"{path}: {error}") from None
    problems = list(check_keys(config))
    if any(wrong_kind for wrong_kind, _ in problems):
        raise ConfigError(list_problems([problem for _, problem in problems], f"in {path}"))
    return config


def unique_keys(pairs: list[tuple[str, Any]]) -> Json:
    """An object_pairs_hook: ValueError for a duplicate key; without null, which stands for DeepSpeed's default."""
    names = [name for name, _ in pairs]
    if duplicates := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"duplicate key {duplicates[0]!r}; keep one")
    return {name: value for name, value in pairs if value is not None}


def check_keys(block: Json, kinds: Json = KEYS, path: str = "", auto: bool = True) -> Iterator[tuple[bool, str]]:
    """(whether its value is of a wrong kind, the problem) of each key that is unknown or not of its kind.

    auto: accept "auto". What is left of it is an error, except in blocks where DeepSpeed takes it for its default.
    """
    checked_later = not kinds or path.startswith("zero_optimization.")  # by DeepSpeed
    for name, value in block.items():
        place, kind = f"{path}{name}", kinds.get(name)
        if UNSUPPORTED.get(place) and value:
            yield False, f"{place}: not supported, {UNSUPPORTED[place]}; remove it"
        elif kind is None:
            if not checked_later and place not in UNSUPPORTED:
                yield False, f"{place}: unknown key{did_you_mean(name, kinds) or '; remove it'}"
        elif isinstance(kind, dict) and isinstance(value, dict):
            yield from check_keys(value, kind, f"{place}.", auto)
        elif not is_kind(value, kind) and (value != "auto" or not auto or isinstance(kind, dict) or checked_later):
            yield True, f"{place} = {json.dumps(value):.80}: must be {KIND_NAMES[type(kind)].format(kind)}"


def is_kind(value: Any, kind: Any) -> bool:
    if isinstance(kind, tuple):
        return json.dumps(value) in map(json.dumps, kind)
    if type(kind) in (int, float):
        return type(value) in (int, type(kind)) and value >= kind
    return type(value) is type(kind)


def dotted(config: Json, path: str) -> Any:
    """config["a"]["b"] for the path "a.b"; None if it is missing."""
    value: Any = config
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def put(config: Json, path: str, value: Any) -> None:
    """Set config["a"]["b"] for the path "a.b"."""
    *blocks, name = path.split(".")
    for block in blocks:
        config = config.setdefault(block, {})
    config[name] = value
