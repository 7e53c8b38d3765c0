"""A training loop with nothing around it, which tools.benchmark --beside=tests.bare_loop times beside this code's.

    python -m launch.ranks 2 -m tests.bare_loop zero2 config/train_debug.py --steps=30

The same model, settings, optimizer and DeepSpeed JSON, with nanoGPT's way of reading batches, and a line for each step
as nanoGPT prints it; no checks, other logs or checkpoints. At the end it writes out_dir/metrics.jsonl.
"""

import json
import re
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel as DDP

from data.dataset import Dataset, open_dataset
from model import GPT, GPTConfig, initial_value
from training.config import ROOT, PlainTrainConfig, TrainConfig, parse
from training.deepspeed_config import DeepSpeedTrainConfig, describe_json, read, resolve
from training.devices import peak_memory_bytes
from training.distributed import Layout, Ranks, pick_dtype, run, start
from training.errors import UserError
from training.metrics import WARM_UP_STEPS
from training.optim import make_optimizer, parameter_groups

Batch = Callable[[], tuple[Tensor, Tensor]]
Step = Callable[[], Tensor]


@torch.no_grad()
def fill(model: GPT, seed: int) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(initial_value(name, parameter.shape, model.config, seed))


def plain_loop(name: str, cfg: TrainConfig, ranks: Ranks, shape: GPTConfig, batch: Batch) -> Step:
    """Build and wrap the model; returns the function that takes a step and returns the loss of its last micro-step."""
    dtype = pick_dtype(cfg.dtype, ranks.device)
    model: Any = GPT(shape).to(ranks.device)
    fill(model, cfg.seed)
    if cfg.compile:
        model.compile()
    if name == "fsdp":
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        for block in (*model.transformer.h, model):
            fully_shard(block, mp_policy=policy, reshard_after_forward=block is not model)
    if name == "ddp":
        model = DDP(model, gradient_as_bucket_view=True)
    optimizer = make_optimizer(model, cfg)
    autocast = torch.autocast(ranks.device.type, dtype, enabled=dtype != torch.float32 and name != "fsdp")
    return partial(plain_step, model, optimizer, autocast, cfg, ranks, batch)


def plain_step(
    model: Any, optimizer: Any, autocast: torch.autocast, cfg: TrainConfig, ranks: Ranks, batch: Batch
) -> Tensor:
    micro_steps = cfg.gradient_accumulation_steps // ranks.world_size
    for micro_step in range(micro_steps):
        model.require_backward_grad_sync = micro_step == micro_steps - 1  # of DDP
        with autocast:
            loss = model(*batch())
        (loss / micro_steps).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
    optimizer.step()
    optimizer.zero_grad()
    return loss


def deepspeed_loop(cfg: Any, ranks: Ranks, shape: GPTConfig, batch: Batch) -> Step:
    """The same by DeepSpeed, which builds the model under ZeRO-3."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # an op for inference, which it would compile
    deepspeed.init_distributed()
    config, _ = resolve(cfg, ranks, shape, read(cfg.deepspeed_config))
    with deepspeed.zero.Init(config_dict_or_path=config, enabled=describe_json(config)[0] == 3):
        model = GPT(shape)
    with deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0):  # no effect below ZeRO-3
        fill(model, cfg.seed)
    groups = parameter_groups(model, cfg)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=config)
    if cfg.compile:
        engine.compile()
    return partial(deepspeed_step, engine, cfg, ranks, batch)


def deepspeed_step(engine: Any, cfg: TrainConfig, ranks: Ranks, batch: Batch) -> Tensor:
    for _ in range(cfg.gradient_accumulation_steps // ranks.world_size):
        loss = engine(*batch())
        engine.backward(loss)
        engine.step()
    return loss


def make_batch(cfg: TrainConfig, dataset: Dataset, ranks: Ranks) -> Batch:
    random = np.random.default_rng(ranks.rank)

    def batch() -> tuple[Tensor, Tensor]:
        ids = np.memmap(dataset.path("train"), dataset.dtype, "r")  # anew: all pages ever read would count as memory
        starts = random.integers(len(ids) - cfg.block_size, size=cfg.batch_size)
        rows = np.stack([ids[start : start + cfg.block_size + 1] for start in starts]).astype(np.int64)
        tokens = torch.from_numpy(rows).to(ranks.device)
        return tokens[:, :-1], tokens[:, 1:]

    return batch


def write_metrics(cfg: TrainConfig, steps: list[tuple[float, float, int]]) -> None:
    """steps: loss, milliseconds, and the peak memory in bytes, 0 if it is not known.

    As in our runs, the warm-up steps have no time.
    """
    tokens, rows = cfg.gradient_accumulation_steps * cfg.batch_size * cfg.block_size, []
    for number, (loss, ms, peak) in enumerate(steps):
        row: dict[str, Any] = {"kind": "train", "step": number, "loss": loss, "mfu": None, "peak_memory_bytes": peak}
        row |= {"step_ms": None} if number < WARM_UP_STEPS else {"step_ms": ms, "tokens_per_second": 1e3 * tokens / ms}
        rows.append(row)
    Path(cfg.out_dir).mkdir(parents=True, exist_ok=True)
    Path(cfg.out_dir, "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    name, *arguments = sys.argv[1:]
    if not re.fullmatch("single|ddp|fsdp|zero[0-3]", name):
        raise UserError(f"tests.bare_loop has no loop for {name}; use single, ddp, fsdp or zero0 to zero3")
    zero = name.startswith("zero")
    cfg = parse(DeepSpeedTrainConfig if zero else PlainTrainConfig, arguments, "")
    if cfg.layout() != Layout():
        raise UserError("tests.bare_loop has no loop for tensor, pipeline, sequence or expert parallelism")
    dataset = open_dataset(ROOT / "data" / cfg.dataset)
    shape = cfg.model_config(dataset.vocab_size)
    with start(cfg.device, cfg.backend, process_group=name != "single", tf32=cfg.tf32) as ranks:
        batch = make_batch(cfg, dataset, ranks)
        step = deepspeed_loop(cfg, ranks, shape, batch) if zero else plain_loop(name, cfg, ranks, shape, batch)
        steps = []
        for number in range(cfg.steps):
            since = time.perf_counter()
            loss = step().item()  # waits for the device
            steps.append((loss, 1e3 * (time.perf_counter() - since), peak_memory_bytes(ranks.device)))
            if ranks.main:
                print(f"iter {number}: loss {loss:.4f}, time {steps[-1][1]:.2f}ms", flush=True)
        if ranks.main:
            write_metrics(cfg, steps)


if __name__ == "__main__":
    run(main)
