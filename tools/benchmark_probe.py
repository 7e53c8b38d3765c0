"""Measure memory and the parts of a step inside each rank, while a real train script runs a few steps.

    python -m launch.ranks 2 -m tools.benchmark_probe train_deepspeed.py config/train_debug.py --out_dir=OUT ...

tools/benchmark.py launches it, and every rank writes OUT/probe_<rank>.json.
"""

import gc
import importlib
import json
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.profiler import profile, record_function

from model import GPT
from tools import all_reduce
from training.devices import peak_memory_bytes, synchronize, time_matmul
from training.distributed import run
from training.strategies import model_state_bytes, partition_ranks

CENSUS_STEP, TRACED_STEPS = 1, (4, 5, 6)
STEPS = (f"--max_iters={TRACED_STEPS[-1] + 1}", "--eval_interval=1000000", "--eval_iters=1")
PARTS = ("computation", "communication", "offload", "other")  # of a step; where several overlap, the first one counts


class Probe:
    """Takes the place of a trainer's train_step, and writes what it measured after the last traced step."""

    def __init__(self, trainer: Any, process_bytes: int):
        self.trainer, self.device, self.train_step = trainer, trainer.ranks.device, trainer.train_step
        self.on_gpu = self.device.type == "cuda"
        self.step, self.profiler = 0, profile()  # of CPU and GPU
        self.census: dict[str, dict[str, int]] = {}  # device type -> kind -> bytes
        self.note: dict[str, Any] = {"process_bytes": process_bytes}
        trainer.train_step = self.take_step
        if engine := getattr(trainer, "engine", None):
            engine.step = partial(self.take_census, engine.step)
        else:
            register_optimizer_step_pre_hook(partial(self.take_census, lambda *_: None))

    def take_census(self, update: Callable[..., None], *args: Any) -> None:
        """Count tensors, then update. DeepSpeed calls it after each backward pass; the largest count is kept."""
        if self.step == CENSUS_STEP:
            census = {name: count_tensors(self.trainer, name) for name in {self.device.type, "cpu"}}
            self.census = max(census, self.census, key=model_state)
        update(*args)

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
            self.measure_machine()
            self.finish()
        return result

    def measure_machine(self) -> None:
        """Matmul ceiling and link; all ranks at once, as they compute and communicate in a run."""
        ranks, dtype = self.trainer.ranks, self.trainer.dtype
        sizes = (4096, 8192, 16384) if self.on_gpu else (512, 1024)  # of square matrices
        rates = [2 * size**3 / time_matmul(self.device, dtype, size, 5) for size in sizes for _ in range(4)]
        self.note |= {"dtype": str(dtype).removeprefix("torch."), "matmul_flops": max(rates)}
        if ranks.world_size > 1:
            self.note["link_bytes_per_second"] = all_reduce.measure(ranks)["bytes_per_second"]

    def finish(self) -> None:
        """Write the note. Activations are the rest of the peak besides tensors and, on CPUs, the process itself."""
        trainer, rank, config = self.trainer, self.trainer.ranks.rank, self.trainer.model.config
        kinds = {**self.census[self.device.type], "interpreter": 0 if self.on_gpu else self.note["process_bytes"]}
        peak = self.note["peak_device_bytes" if self.on_gpu else "peak_host_bytes"]
        engine, size = getattr(trainer, "engine", None), config.parameter_count()
        fp32_accumulation = engine is not None and engine._config.grad_accum_dtype == "fp32"
        shards = partition_ranks(trainer.cfg, trainer.ranks)
        expected = model_state_bytes(trainer.strategy, shards, size, trainer.dtype, fp32_accumulation)
        trace = Path(trainer.cfg.out_dir) / f"trace_{rank}.json"
        self.profiler.export_chrome_trace(str(trace))
        self.note |= {
            "memory": {**kinds, "activations": max(0, peak - sum(kinds.values()))},
            "model_state_bytes": model_state(self.census),
            "expected_bytes": round(expected.total()),
            "parameter_count": size,
            "flops_per_token": config.flops_per_token(),
            "breakdown_ms": break_down(json.loads(trace.read_text())["traceEvents"]),
        }
        trace.with_name(f"probe_{rank}.json").write_text(json.dumps(self.note))


def model_state(census: dict[str, dict[str, int]]) -> int:
    """Bytes of everything but buffers, on the device and in host memory."""
    return sum(size for kinds in census.values() for kind, size in kinds.items() if kind != "buffers")


def count_tensors(trainer: Any, device: str) -> dict[str, int]:
    """Bytes of all living tensors on a device type: parameters, optimizer_states, buffers, and gradients (the rest).

    To be called after a backward pass and before the update, from the second step on: then the optimizer has its
    states, and no activation is left.
    """
    model, optimizer = trainer.model, trainer.optimizer  # torch's optimizer, or DeepSpeed's wrapper around it
    gc.collect()
    living = [item for item in gc.get_objects() if issubclass(type(item), Tensor) and item.device.type == device]
    # a gradient has no Python object until somebody asks for it
    living += [tensor.grad for tensor in living if tensor.is_leaf and tensor.grad is not None]
    parameters = list(model.parameters())
    partitions = [getattr(parameter, "ds_tensor", None) for parameter in parameters]  # under ZeRO-3
    states: list[Any] = []
    for one in (optimizer, getattr(optimizer, "optimizer", None)):
        states += [value for state in getattr(one, "state", {}).values() for value in state.values()]
        for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):  # DeepSpeed's fp32 copy
            states += getattr(one, name, ())
    rest, sizes = storages(living, device), {}
    kinds = {"buffers": deepspeed_buffers(model, optimizer), "parameters": parameters + partitions}
    for kind, tensors in {**kinds, "optimizer_states": states}.items():
        sizes[kind] = sum(rest.pop(address, 0) for address in storages(tensors, device))
    return {**sizes, "gradients": sum(rest.values())}


def storages(items: Iterable[Any], device: str) -> dict[int, int]:
    """Address -> bytes. A shared storage counts once, a DTensor by its local shard; what is not a tensor is skipped."""
    tensors = (getattr(item, "_local_tensor", item) for item in items if isinstance(item, Tensor))
    held = (tensor.untyped_storage() for tensor in tensors if tensor.device.type == device)
    return {storage.data_ptr(): storage.nbytes() for storage in held if storage.nbytes()}


def deepspeed_buffers(model: nn.Module, optimizer: Any) -> list[Any]:
    """Buckets for reducing gradients (reduce_bucket_size elements, twice with overlap_comm), and NVMe buffers."""
    held: list[Any] = []
    swappers = [getattr(parameter, "nvme_swapper", None) for parameter in model.parameters()]
    for swapper in (getattr(optimizer, "optimizer_swapper", None), *swappers):
        held.append(getattr(swapper, "buffers", None))
        held += getattr(getattr(swapper, "swap_buffer_manager", None), "all_buffers", [])
    for bucket in getattr(optimizer, "ipg_buckets", {}).values():
        held += bucket.buffer if isinstance(bucket.buffer, list) else [bucket.buffer]
    return held


def break_down(events: list[dict[str, Any]]) -> dict[str, float]:
    """Milliseconds of each part of a step, the mean of the traced steps. events: Chrome's trace format.

    computation: kernels; on CPUs, aten operations of the main thread. communication: collectives, sending or waiting
    for a slower rank. offload: copies between GPU and host memory. other: the rest, such as reading batches, Python,
    DeepSpeedCPUAdam, NVMe.
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
    if category in ("kernel", "gpu_memcpy", "gpu_memset"):
        return "communication" if "nccl" in name.lower() else "computation"
    if not on_gpu and name.startswith(("gloo:", "c10d::")):
        return "communication"
    return "computation" if not on_gpu and event["tid"] == main_thread and name.startswith("aten::") else "other"


def main() -> None:
    name, *arguments = sys.argv[1:]
    script: Any = importlib.import_module(name.removesuffix(".py"))
    build_model, build_trainer = GPT.__init__, script.Trainer
    process: list[int] = []  # peak bytes of this process before its model is built

    def measure_process(self: GPT, *args: Any) -> None:
        process.append(peak_memory_bytes(torch.device("cpu")))
        build_model(self, *args)

    def watch(*args: Any) -> Any:
        trainer = build_trainer(*args)
        Probe(trainer, process[0])
        return trainer

    GPT.__init__ = measure_process  # type: ignore[method-assign, assignment]
    script.Trainer = watch
    sys.argv = [name, *arguments, *STEPS, "--always_save_checkpoint=True"]
    script.main()


if __name__ == "__main__":
    run(main)
