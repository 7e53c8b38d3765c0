"""Metrics: metrics.jsonl (the only source of numbers), the terminal, and Weights & Biases."""

import json
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from training.batches import Batches
from training.devices import peak_flops, peak_memory_bytes
from training.distributed import Ranks
from training.figures import draw_loss
from training.files import write_text
from training.origin import Origin
from training.speed import summarise
from training.stragglers import BY_RANK, Stragglers
from training.train_config import TrainConfig

OF_STEP = ("eval", "save")  # before the update of their step, so that they stay where a run resumes
WARM_UP_STEPS = 3  # a process' first steps compile, allocate and fill caches: they are not timed


class Metrics:
    def __init__(self, cfg: TrainConfig, ranks: Ranks, batches: Batches, origin: Origin, dtype: torch.dtype):
        self.ranks, self.tokens_per_step = ranks, batches.tokens_per_step
        self.stragglers = Stragglers(ranks, batches, dtype)
        peak = peak_flops(ranks.device, dtype)
        self.flops_per_step = origin.model.flops_per_token() * self.tokens_per_step
        self.peak = peak and peak * ranks.world_size
        self.path = Path(cfg.out_dir) / "metrics.jsonl"
        self.steps = self.timed_steps = 0
        self.seconds, self.since = 0.0, time.perf_counter()
        self.recording = ranks.main and not cfg.eval_only  # who only evaluates leaves the run as it is
        self.wandb = start_wandb(cfg, origin) if cfg.wandb_log and self.recording else None
        live = ranks.main and sys.stderr.isatty()
        end = cfg.steps if cfg.benchmark else cfg.max_iters
        self.bar = tqdm(total=end, unit="step", dynamic_ncols=True, smoothing=0.1) if live else None
        self.benchmark = cfg.benchmark
        self.say(summary(cfg, ranks, origin, dtype))
        if origin.step:
            self.forget(origin.step)
        self.lap()

    def forget(self, step: int) -> None:
        """Drop what a killed run logged after the checkpoint of `step` that this one resumes from."""
        if self.bar:
            self.bar.update(step)
        if self.recording and self.path.exists():
            lines = [line for line in self.path.read_text().splitlines(keepends=True) if line.endswith("}\n")]
            rows = [(line, json.loads(line)) for line in lines]
            write_text(self.path, "".join(line for line, r in rows if r.get("step", 0) < step + (r["kind"] in OF_STEP)))

    def count_step(self) -> None:
        """After every step; costs nothing on the device."""
        self.steps += 1
        if self.steps == WARM_UP_STEPS:
            self.lap()
            self.seconds, self.timed_steps = 0.0, 0
        elif self.steps > WARM_UP_STEPS:
            self.timed_steps += 1
        if self.bar:
            self.bar.update()

    @contextmanager
    def untimed(self) -> Iterator[None]:
        """Around evaluation and saving."""
        self.seconds += self.lap()
        yield
        self.lap()

    @contextmanager
    def saving(self, step: int) -> Iterator[None]:
        """Around a save: what it takes from training."""
        with self.untimed():
            since = time.perf_counter()  # when the device has done what came before
            yield
            seconds = time.perf_counter() - since
        self.write({"kind": "save", "step": step, "save_ms": 1e3 * seconds})

    def lap(self) -> float:
        """Seconds since the last lap, the device's work included."""
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize()
        before, self.since = self.since, time.perf_counter()
        return self.since - before

    def train(self, step: int, loss: float, lr: float, grad_norm: float | None) -> None:
        """One line for the step, with the mean speed since the line before; null while warming up."""
        self.seconds += self.lap()
        seconds = self.seconds / self.timed_steps if self.timed_steps else None
        row = {
            "kind": "train",
            "step": step,
            "loss": loss,
            "lr": lr,
            "grad_norm": grad_norm,
            "step_ms": seconds and seconds * 1e3,
            "tokens_per_second": seconds and self.tokens_per_step / seconds,
            "mfu": self.flops_per_step / seconds / self.peak if seconds and self.peak else None,
            "peak_memory_bytes": peak_memory_bytes(self.ranks.device),
        }
        self.seconds, self.timed_steps = 0.0, 0
        if self.ranks.main:
            self.write(row)
            text = f"loss {loss:.4f}"
            if seconds:
                text += f", {seconds * 1e3:,.1f} ms, {self.tokens_per_step / seconds:,.0f} tokens/s"
            if row["mfu"] is not None:
                text += f", MFU {row['mfu']:.1%}"
            if self.bar:
                self.bar.set_postfix_str(text)
            else:
                self.say(f"step {step}: {text}")
        if by_rank := self.stragglers.look():
            self.write({"kind": "ranks", "step": step, **by_rank})
            for line in self.stragglers.slow():
                self.say(f"step {step}: {line}")
            self.lap()

    def evaluation(self, step: int, losses: dict[str, float]) -> None:
        self.write({"kind": "eval", "step": step, **losses})
        self.say(f"step {step}: train loss {losses['train_loss']:.4f}, val loss {losses['val_loss']:.4f}")

    def say(self, text: str) -> None:
        """A line for people, above the progress bar where there is one; the main rank only."""
        if self.ranks.main:
            (self.bar.write(text) if self.bar else print(text, flush=True))

    def write(self, row: dict[str, Any]) -> None:
        if not self.recording:
            return
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if self.wandb:
            names = {"train_loss": "train/loss", "val_loss": "val/loss"}  # nanoGPT's panels
            shown = {names.get(k, k): v for k, v in row.items() if k not in ("kind", "step", *BY_RANK)}
            by_rank = {f"{k}/rank {rank}": v for k in BY_RANK for rank, v in enumerate(row.get(k, ()))}
            self.wandb.log({**shown, **by_rank}, step=row["step"])

    def close(self) -> None:
        """Finish the displays and draw loss.png; main rank."""
        if self.bar:
            self.bar.close()
        if self.wandb:
            self.wandb.finish()
        if self.recording and self.path.exists():  # it does not, where the first evaluation was stopped
            draw_loss([self.path.parent], self.path.with_name("loss.png"))
            if self.benchmark:
                self.say(summarise(self.path))


def summary(cfg: TrainConfig, ranks: Ranks, origin: Origin, dtype: torch.dtype) -> str:
    """Tokens per step with their factors: the batch is what users of small GPUs get wrong most."""
    accumulation, sequences, length = cfg.gradient_accumulation_steps, cfg.batch_size, cfg.block_size
    where = f"{ranks.world_size} x {ranks.device.type}" if ranks.world_size > 1 else str(ranks.device)
    return (
        f"{origin.model.parameter_count():,} parameters on {where}, {str(dtype).removeprefix('torch.')}; "
        f"{accumulation * sequences * length:,} tokens per step = {ranks.world_size} ranks x "
        f"{accumulation // ranks.world_size} micro-steps x {sequences} sequences x {length} tokens"
        + (f"; resuming {origin.checkpoint}" if origin.checkpoint else "")
    )


def start_wandb(cfg: TrainConfig, origin: Origin) -> Any:
    """The same W&B run when a run is resumed: its id stays in the run folder. Offline with WANDB_MODE=offline."""
    import wandb  # not before it is wanted: it costs a third of a second

    path = Path(cfg.out_dir) / "wandb_id"
    if not origin.checkpoint or not path.exists():
        path.write_text(uuid.uuid4().hex[:8])
    return wandb.init(
        project=cfg.wandb_project,
        name=cfg.wandb_run_name,
        id=path.read_text(),
        resume="allow",
        config=asdict(cfg),
        dir=cfg.out_dir,
        settings=wandb.Settings(silent=True),
    )
