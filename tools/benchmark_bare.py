"""A training loop with nothing around it, which tools.benchmark --bare times beside this code's.

    python -m launch.ranks 2 -m tools.benchmark_bare zero2 config/train_debug.py --steps=30 --out_dir=OUT

The same model, settings and DeepSpeed JSON, with nanoGPT's way of reading batches; no checks, logs or checkpoints.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel as DDP

from data.dataset import open_dataset
from model import GPT, GPTConfig, initial_value
from training.config import ROOT, PlainTrainConfig, TrainConfig, parse
from training.deepspeed_config import DeepSpeedTrainConfig, describe_json, read, resolve
from training.devices import peak_memory_bytes
from training.distributed import Ranks, pick_device, pick_dtype
from training.metrics import WARM_UP_STEPS
from training.optim import parameter_groups

Batch = Callable[[], tuple[Tensor, Tensor]]
Step = Callable[[], Tensor]


@torch.no_grad()
def fill(model: GPT, seed: int) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(initial_value(name, parameter.shape, model.config, seed))


def plain_loop(name: str, cfg: TrainConfig, ranks: Ranks, shape: GPTConfig, dtype: torch.dtype, batch: Batch) -> Step:
    """Build and wrap the model; returns the function that takes a step and returns the loss of its last micro-step."""
    model: Any = GPT(shape).to(ranks.device)
    fill(model, cfg.seed)
    if cfg.compile:
        model.compile()
    micro_steps = cfg.gradient_accumulation_steps // ranks.world_size
    autocast: Any = nullcontext()
    if name == "fsdp":
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        for block in (*model.transformer.h, model):
            fully_shard(block, mp_policy=policy, reshard_after_forward=block is not model)
    elif dtype != torch.float32:
        autocast = torch.autocast(ranks.device.type, dtype)
    if name == "ddp":
        model = DDP(model, gradient_as_bucket_view=True)
    groups = parameter_groups(model, cfg)
    optimizer = torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2), fused=True)

    def step() -> Tensor:
        for micro_step in range(micro_steps):
            model.require_backward_grad_sync = micro_step == micro_steps - 1  # of DDP
            with autocast:
                loss = model(*batch())
            (loss / micro_steps).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


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

    def step() -> Tensor:
        for _ in range(cfg.gradient_accumulation_steps // ranks.world_size):
            loss = engine(*batch())
            engine.backward(loss)
            engine.step()
        return loss

    return step


def time_steps(step: Step, cfg: TrainConfig, ranks: Ranks) -> None:
    """Take cfg.steps steps; rank 0 writes rows like those of metrics.jsonl."""
    tokens_per_step, rows = cfg.gradient_accumulation_steps * cfg.batch_size * cfg.block_size, list[str]()
    for number in range(cfg.steps):
        since = time.perf_counter()
        loss = step().item()  # waits for the device
        seconds = time.perf_counter() - since
        row = {"kind": "train", "step": number, "loss": loss, "grad_norm": None, "mfu": None, "step_ms": None}
        if number >= WARM_UP_STEPS:
            row |= {"step_ms": 1e3 * seconds, "tokens_per_second": tokens_per_step / seconds}
        rows.append(json.dumps(row | {"peak_memory_bytes": peak_memory_bytes(ranks.device)}))
        if ranks.main:
            print(f"step {number}: loss {loss:.4f}, {1e3 * seconds:.1f} ms", flush=True)
    if ranks.main:
        Path(cfg.out_dir).mkdir(parents=True, exist_ok=True)
        Path(cfg.out_dir, "metrics.jsonl").write_text("\n".join(rows) + "\n")


def main() -> None:
    name, *arguments = sys.argv[1:]
    zero = name.startswith("zero")
    cfg = parse(DeepSpeedTrainConfig if zero else PlainTrainConfig, arguments, "")
    rank, local_rank, world_size = (int(os.environ[key]) for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    device = pick_device(cfg.device, local_rank, world_size)
    ranks, dtype = Ranks(rank, local_rank, world_size, device), pick_dtype(cfg.dtype, device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high" if cfg.tf32 else "highest")
    os.environ["DS_ACCELERATOR"] = device.type
    if name != "single":
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    dataset, random = open_dataset(ROOT / "data" / cfg.dataset), np.random.default_rng(rank)
    shape = cfg.model_config(dataset.vocab_size)

    def batch() -> tuple[Tensor, Tensor]:
        ids = np.memmap(dataset.path("train"), dataset.dtype, "r")  # anew: all pages ever read would count as memory
        starts = random.integers(len(ids) - cfg.block_size, size=cfg.batch_size)
        rows = np.stack([ids[start : start + cfg.block_size + 1] for start in starts]).astype(np.int64)
        tokens = torch.from_numpy(rows).to(device)
        return tokens[:, :-1], tokens[:, 1:]

    step = deepspeed_loop(cfg, ranks, shape, batch) if zero else plain_loop(name, cfg, ranks, shape, dtype, batch)
    time_steps(step, cfg, ranks)
    if name != "single":
        dist.barrier()
    os._exit(0)  # gloo's threads sometimes keep a process from ending


if __name__ == "__main__":
    main()
