"""What cannot be in DeepSpeed's JSON: told before anything is allocated, all at once, each with its fix."""

import difflib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from model import GPTConfig
from training.distributed import Ranks, local_world_size
from training.errors import ConfigError, listed
from training.train_config import TrainConfig
from training.units import gigabytes

Json = dict[str, Any]
# The keys of the blocks that DeepSpeed does not check; those of the others it does (see `nested`).
BLOCKS = {
    "": """activation_checkpointing aio bf16 checkpoint comms_logger communication_data_type compile csv_monitor
        data_types dump_state flops_profiler fp16 gradient_accumulation_steps gradient_allreduce_op gradient_clipping
        gradient_predivide_factor log_level memory_breakdown optimizer prescale_gradients scheduler steps_per_print
        tensorboard timers torch_autocast train_batch_size train_micro_batch_size_per_gpu wall_clock_breakdown wandb
        zero_allow_untested_optimizer zero_force_ds_cpu_optimizer zero_optimization""",
    "activation_checkpointing": """partition_activations contiguous_memory_optimization cpu_checkpointing
        number_checkpoints synchronize_checkpoint_boundary profile""",
    "aio": """block_size queue_depth intra_op_parallelism single_submit overlap_events use_gds""",
    "data_types": "grad_accum_dtype param_dtype buffer_dtype keep_in_fp32_modules",
    "flops_profiler": "enabled recompute_fwd_factor profile_step module_depth top_modules detailed output_file",
    "optimizer": "type params legacy_fusion",
    "optimizer.params": "lr betas eps weight_decay torch_adam fused foreach adam_w_mode fp32_optimizer_states",
    "scheduler": "type params",
}
# Keys that DeepSpeed has, with the reason why they are of no use here.
REFUSED = {
    "amp": "Apex is not supported with ZeRO; set dtype",
    "tensor_parallel": "this code has data parallelism only",
    "pipeline": "this code has data parallelism only",
    "data_efficiency": "batches come from this code, so that every strategy sees the same ones",
    "curriculum_learning": "batches come from this code, so that every strategy sees the same ones",
    "sparse_gradients": "the embedding is also the output matrix, so its gradient is dense",
    "elasticity": "a run keeps its number of ranks",
    "autotuning": "it starts runs of its own, which this code cannot follow",
}
SCHEDULERS = ("LRRangeTest", "OneCycle", "WarmupLR", "WarmupDecayLR", "WarmupCosineLR")


def dotted(config: Json, path: str) -> Any:
    """config["a"]["b"] for "a.b"; None where there is none."""
    found: Any = config
    for name in path.split("."):
        found = found.get(name) if isinstance(found, dict) else None
    return found


def check(config: Json, cfg: TrainConfig, model: GPTConfig, ranks: Ranks) -> Iterator[str]:
    """A line for each problem of a JSON whose "auto" is filled in."""
    yield from (f"{name}: {why}; remove it" for name, why in REFUSED.items() if name in config)
    for block, names in BLOCKS.items():
        found = dotted(config, block) if block else config
        if isinstance(found, dict):
            for name in found.keys() - set(names.split()) - REFUSED.keys():
                near = difflib.get_close_matches(name, names.split(), n=1)
                fix = f"did you mean {near[0]}?" if near else "remove it"
                yield f"{block}{'.' * bool(block)}{name}: unknown key; {fix}"
        elif found is not None:
            yield f"{block} = {found!r}: must be an object"
    yield from (f'{path} = "auto": has no automatic value here; write one, or remove it' for path in unresolved(config))
    yield from of_optimizer(config)
    yield from of_activations(config, cfg, ranks)
    yield from of_offload(config, model, ranks)


def unresolved(config: Any, path: str = "") -> Iterator[str]:
    if config == "auto":
        yield path
    elif isinstance(config, dict):
        for name, value in config.items():
            yield from unresolved(value, f"{path}.{name}" if path else name)


def of_optimizer(config: Json) -> Iterator[str]:
    kind = dotted(config, "optimizer.type")
    if "optimizer" in config and kind not in ("Adam", "AdamW"):
        yield f"optimizer.type = {kind!r}: must be AdamW; without the block, train.py's own AdamW is taken"
    if kind and dotted(config, "optimizer.params.adam_w_mode") is False:
        yield "optimizer.params.adam_w_mode = false: would be Adam with L2 regularisation; remove it"
    kind = dotted(config, "scheduler.type")
    if "scheduler" in config and kind not in SCHEDULERS:
        yield f"scheduler.type = {kind!r}: must be one of {', '.join(SCHEDULERS)}; without the block, it is ours"


def of_activations(config: Json, cfg: TrainConfig, ranks: Ranks) -> Iterator[str]:
    block = config.get("activation_checkpointing")
    if not isinstance(block, dict):
        return
    if not cfg.activation_checkpointing:
        yield "activation_checkpointing: only says how; set --activation_checkpointing=True, or remove the block"
    if block.get("cpu_checkpointing") and not block.get("partition_activations") and ranks.device.type == "cpu":
        yield "activation_checkpointing.cpu_checkpointing: on a CPU, needs partition_activations = true as well"
    fits = block.get("partition_activations") and block.get("number_checkpoints") == cfg.n_layer
    if block.get("contiguous_memory_optimization") and not fits:
        yield (
            "activation_checkpointing.contiguous_memory_optimization: needs partition_activations = true and "
            f"number_checkpoints = {cfg.n_layer}, the number of blocks"
        )


def of_offload(config: Json, model: GPTConfig, ranks: Ranks) -> Iterator[str]:
    stage = dotted(config, "zero_optimization.stage") or 0
    # 12 bytes: the optimizer's fp32 parameter, first and second moment; the weights themselves are 2 or 4.
    for what, least, size in (("optimizer", 1, 12), ("param", 3, 2 if dotted(config, "bf16.enabled") else 4)):
        name = f"zero_optimization.offload_{what}"
        block = dotted(config, name) or {}
        device = block.get("device")
        least = 3 if device == "nvme" else least
        if device in ("cpu", "nvme") and stage < least:
            yield f"{name}.device = {device!r}: stage {stage} lacks it; take stage {least}, or remove the block"
        elif device == "nvme":
            needed = size * model.parameter_count() * local_world_size() // ranks.world_size
            yield from of_disk(f"{name}.nvme_path", block.get("nvme_path"), needed)
            largest = -(-model.vocab_size * model.n_embd // ranks.world_size)
            if what == "param" and block.get("buffer_size", 1e8) < largest:
                yield f"{name}.buffer_size = {block['buffer_size']}: a rank's largest partition has {largest}; set that"


def of_disk(name: str, path: str | None, needed: int) -> Iterator[str]:
    if not path or not Path(path).is_dir():
        yield f"{name} = {path!r}: no such folder; set --nvme_path to one on a local NVMe disk"
    elif (free := shutil.disk_usage(path).free) < needed:
        yield f"{name} = {path!r}: {gigabytes(free)} free, {gigabytes(needed)} needed; set --nvme_path elsewhere"


def nested(config: Json, parse: type, path: str) -> None:
    """Let DeepSpeed check what is inside its blocks; parse is deepspeed.DeepSpeedConfig."""
    try:
        parse(config)
    except Exception as error:
        errors = getattr(error, "errors", None)
        if errors is None:
            raise ConfigError(f"{path}: {str(error).splitlines()[0]}") from None
        lines = []
        for found in errors():
            block = next(n for n, b in config.items() if isinstance(b, dict) and found["loc"][0] in b)
            place = ".".join([block, *map(str, found["loc"])])
            lines.append(f"{place} = {found['input']!r}: {found['msg'][0].lower()}{found['msg'][1:]}")
        raise ConfigError(listed(lines, f"in {path}")) from None
