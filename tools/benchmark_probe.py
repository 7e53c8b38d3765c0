"""Measure memory and the parts of a step inside each rank, while a real train script runs a few steps.

    python -m launch.ranks 2 -m tools.benchmark_probe train_deepspeed.py config/train_debug.py --out_dir=OUT ...

tools/benchmark.py launches it, and every rank writes OUT/probe_<rank>.json.
"""

import gc
import importlib
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.profiler import profile, record_function
from torch.utils._pytree import tree_leaves

from model import GPTConfig
from tools import all_reduce
from tools.plan_formulas import Part
from training.devices import peak_memory_bytes, synchronize, time_matmul
from training.distributed import run, world_size

CENSUS_STEP, TRACED_STEPS = 1, (4, 5, 6)
STEPS = (f"--max_iters={TRACED_STEPS[-1] + 1}", "--eval_interval=1000000")
PARTS = ("computation", "communication", "offload", "other")  # of a step; where several overlap, the first one counts
BUFFERS = {  # class of DeepSpeed -> its buffers: of gradients to reduce (twice with overlap_comm), a pipeline's, NVMe's
    **{"IPGBucket": "buffer", "IPGBucketZ3": "buffer", "PipelineEngine": "pipe_buffers"},
    **{"SwapBufferManager": "all_buffers", "AsyncPartitionedParameterSwapper": "buffers"},
}
# torch's states, and DeepSpeed's fp32 copy of the parameters
OPTIMIZER_STATES = ("state", "single_partition_of_fp32_groups", "fp32_partitioned_groups_flat")


class Probe:
    """Takes the place of a trainer's train_step, and writes what it measured after the last traced step."""

    def __init__(self, trainer: Any, config: GPTConfig, note: dict[str, Any]):
        self.trainer, self.device, self.train_step = trainer, trainer.ranks.device, trainer.train_step
        self.config, self.note = config, note  # has process_bytes: the peak before the model was built
        self.on_gpu = self.device.type == "cuda"
        self.step, self.profiler = 0, profile()  # of CPU and GPU
        self.census: dict[str, dict[str, int]] = {}  # device type -> kind -> bytes
        trainer.train_step = self.take_step
        steps_by_engine = hasattr(trainer, "engine") and trainer.ranks.layout.pipeline == 1
        updater = trainer.engine if steps_by_engine else trainer.optimizer
        updater.step = partial(self.take_census, updater.step)

    def take_census(self, update: Callable[..., None], *args: Any, **options: Any) -> None:
        """Count tensors, then update. DeepSpeed calls it after each backward pass; the largest count is kept."""
        if self.step == CENSUS_STEP:
            census = {name: count_tensors(self.trainer, name) for name in {self.device.type, "cpu"}}
            self.census = max(census, self.census, key=model_state)
        update(*args, **options)

    def take_step(self, step: int) -> Any:
        self.step = step
        if step == TRACED_STEPS[0] - 1:  # early, because the profiler does not start on all ranks at once
            self.note["peak_host_bytes"] = peak_memory_bytes(torch.device("cpu"))
            self.note["peak_device_bytes"] = peak_memory_bytes(self.device) if self.on_gpu else None
            self.profiler.start()
        with record_function(f"step {step}"):
            result = self.train_step(step)
            synchronize(self.device)
        if step == TRACED_STEPS[-1]:
            self.profiler.stop()
            self.finish()
        return result

    def finish(self) -> None:
        """Measure the machine, on all ranks at once, as they compute and communicate in a run, and write the note."""
        trainer, ranks, dtype, config = self.trainer, self.trainer.ranks, self.trainer.dtype, self.config
        matrices = (4096, 8192, 16384) if self.on_gpu else (512, 1024)
        rates = [2 * size**3 / time_matmul(self.device, dtype, size, 5) for size in matrices for _ in range(4)]
        if ranks.world_size > 1:
            self.note["link_bytes_per_second"] = all_reduce.measure(ranks)["bytes_per_second"]
        memory = {**self.census[self.device.type], "interpreter": 0 if self.on_gpu else self.note["process_bytes"]}
        peak = self.note["peak_device_bytes" if self.on_gpu else "peak_host_bytes"]
        part = Part(config, ranks.layout, ranks.world_size, getattr(trainer.cfg, "shard_ranks", 0))
        trace = Path(trainer.cfg.out_dir) / f"trace_{ranks.rank}.json"
        self.profiler.export_chrome_trace(str(trace))
        self.note |= {
            "dtype": str(dtype).removeprefix("torch."),
            "matmul_flops": max(rates),
            "memory": {**memory, "activations": max(0, peak - sum(memory.values()))},  # the rest of the peak
            "model_state_bytes": model_state(self.census),
            "expected_bytes": round(part.state(trainer.strategy, dtype).total()),
            "parameter_count": config.parameter_count(),
            "flops_per_token": config.flops_per_token(),
            "breakdown_ms": break_down(json.loads(trace.read_text())["traceEvents"]),
        }
        trace.with_name(f"probe_{ranks.rank}.json").write_text(json.dumps(self.note))


def model_state(census: dict[str, dict[str, int]]) -> int:
    """Bytes of everything but buffers, on the device and in host memory."""
    return sum(size for kinds in census.values() for kind, size in kinds.items() if kind != "buffers")


def count_tensors(trainer: Any, device: str) -> dict[str, int]:
    """Bytes of all living tensors on a device type: parameters, optimizer_states, buffers, and gradients (the rest).

    To be called after a backward pass and before the update, from the second step on: then the optimizer has its
    states, and no activation is left.
    """
    time.sleep(0.3)  # gloo's threads let go of what they have sent a moment after a collective has ended
    gc.collect()
    objects = gc.get_objects()
    living = [item for item in objects if issubclass(type(item), Tensor) and item.device.type == device]
    # a gradient has no Python object until somebody asks for it
    living += [tensor.grad for tensor in living if tensor.is_leaf and tensor.grad is not None]
    parameters = list(trainer.model.parameters())
    optimizers = trainer.optimizer, getattr(trainer.optimizer, "optimizer", None)  # DeepSpeed's wrapper and torch's
    kinds = {
        "buffers": [getattr(item, BUFFERS[type(item).__name__]) for item in objects if type(item).__name__ in BUFFERS],
        "parameters": [parameters, [getattr(one, "ds_tensor", None) for one in parameters]],  # ZeRO-3's partitions
        "optimizer_states": [getattr(one, name, None) for one in optimizers for name in OPTIMIZER_STATES],
    }
    rest, sizes = storages(living, device), {}
    for kind, tensors in kinds.items():
        sizes[kind] = sum(rest.pop(address, 0) for address in storages(tensors, device))
    return {**sizes, "gradients": sum(rest.values())}


def storages(tree: Any, device: str) -> dict[int, int]:
    """Address -> bytes of all tensors in nested lists and dicts; of a DTensor, the local shard."""
    tensors = (getattr(item, "_local_tensor", item) for item in tree_leaves(tree) if isinstance(item, Tensor))
    held = (tensor.untyped_storage() for tensor in tensors if tensor.device.type == device)
    return {storage.data_ptr(): storage.nbytes() for storage in held if storage.nbytes()}


def break_down(events: list[dict[str, Any]]) -> dict[str, float]:
    """Milliseconds of each of PARTS, the mean of the traced steps. events: Chrome's trace format.

    communication includes waiting for a slower rank; other includes batches, Python, DeepSpeedCPUAdam and NVMe.
    """
    events = [event for event in events if event.get("ph") == "X"]
    on_gpu = any(event.get("cat") == "kernel" for event in events)
    names = [f"step {step}" for step in TRACED_STEPS]
    steps = [event for event in events if event["name"] in names and event.get("cat") == "user_annotation"]
    microseconds = np.zeros(len(PARTS))
    for step in steps:
        timeline = np.full(round(step["dur"]), PARTS.index("other"))  # the part of each microsecond
        for event in events:
            since = event["ts"] - step["ts"]
            span = timeline[max(0, round(since)) : max(0, round(since + event["dur"]))]
            np.minimum(span, PARTS.index(classify(event, step["tid"], on_gpu)), out=span)
        microseconds += np.bincount(timeline, minlength=len(PARTS))
    return dict(zip(PARTS, (microseconds / 1e3 / len(steps)).tolist(), strict=True))


def classify(event: dict[str, Any], main_thread: Any, on_gpu: bool) -> str:
    """The part of a step to which an event of the trace belongs."""
    name, category = event["name"], event.get("cat")
    if category == "gpu_memcpy" and ("HtoD" in name or "DtoH" in name):
        return "offload"
    if on_gpu and category in ("kernel", "gpu_memcpy", "gpu_memset"):
        return "communication" if "nccl" in name.lower() else "computation"
    if not on_gpu and name.startswith(("gloo:", "c10d::")):
        return "communication"
    return "computation" if not on_gpu and event["tid"] == main_thread and name.startswith("aten::") else "other"


def main() -> None:
    name, *arguments = sys.argv[1:]
    script: Any = importlib.import_module(name.removesuffix(".py"))
    trainer_class, note = script.Trainer, dict[str, Any]()
    method = "build" if hasattr(trainer_class, "build") else "__init__"  # that creates the model
    create_model = getattr(trainer_class, method)

    def measure(*args: Any) -> None:
        note["process_bytes"] = peak_memory_bytes(torch.device("cpu"))
        create_model(*args)

    setattr(trainer_class, method, measure)
    script.Trainer = lambda *args: Probe(trainer_class(*args), args[3].model, note).trainer  # args[3]: InitState
    sys.argv = [name, *arguments, *STEPS, f"--eval_iters={world_size()}", "--always_save_checkpoint=True"]
    script.main()


if __name__ == "__main__":
    run(main)
