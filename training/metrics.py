"""Metrics: metrics.jsonl (the only source of numbers), the terminal, and Weights & Biases."""

import gc
import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from data.tokenizer import copy_files
from training.batches import Batches
from training.checkpoint import write_text
from training.config import TrainConfig
from training.devices import peak_flops, peak_memory_bytes, synchronize
from training.distributed import Layout, Ranks
from training.errors import count
from training.figures import new_figure, plot_losses, read_rows
from training.init import InitState

BEFORE_THE_UPDATE = ("eval", "save")  # rows of a step that stay valid when the run resumes at that step
OF_ONE_RANK = ("loss", "expert_balance")  # numbers of a rank's own batches; the mean over all ranks is logged
WARM_UP_STEPS = 3  # not timed: a process's first steps compile, allocate and fill caches


class Metrics:
    def __init__(self, cfg: TrainConfig, ranks: Ranks, batches: Batches, init: InitState, dtype: torch.dtype):
        self.cfg, self.ranks, self.tokens_per_step = cfg, ranks, batches.tokens_per_step
        self.dataset, self.stragglers = batches.dataset, None
        if ranks.world_size > 1:
            from training.stragglers import Stragglers

            self.stragglers = Stragglers(ranks, dtype)
        self.peak_flops = (peak_flops(ranks.device, dtype) or 0) * ranks.world_size  # 0: unknown
        self.flops_per_step = init.model.flops_per_token() * self.tokens_per_step
        self.path = Path(cfg.out_dir) / "metrics.jsonl"
        self.steps = self.timed_steps = 0
        self.seconds, self.lap_start = 0.0, time.perf_counter()
        self.start_time = self.first_timed = self.lap_start
        self.recording = ranks.main and not cfg.eval_only  # an evaluation leaves the run folder unchanged
        if self.recording:
            copy_files(self.dataset.tokenizer, self.path.parent)  # which sample.py needs
        self.trackers: list[Any] = []
        if self.recording and (cfg.wandb_log or cfg.tensorboard):
            from training.trackers import start_trackers

            self.trackers = start_trackers(cfg, init)
        self.first_step, self.end = init.step, cfg.steps if cfg.benchmark else cfg.max_iters
        self.say(start_line(cfg, ranks, init, dtype))
        if cfg.device == "auto" and ranks.device.type == "cpu":
            self.say("no GPU found, training on the CPU; lower n_layer, n_embd, block_size or batch_size for speed")
        if self.recording and self.path.exists():  # drop what a killed run logged after its last checkpoint
            rows = read_rows(self.path)
            kept = (line for line, row in rows if row["step"] < init.step + (row["kind"] in BEFORE_THE_UPDATE))
            write_text(self.path, "".join(kept))
        self.lap()

    def count_step(self) -> None:
        """Call after every step; does not wait for the device."""
        self.steps += 1
        if self.steps == WARM_UP_STEPS:
            gc.collect()
            gc.freeze()  # what exists now lives to the end of the run: later collections need not look at it
            self.lap()
            self.seconds, self.timed_steps, self.first_timed = 0.0, 0, self.lap_start
        elif self.steps > WARM_UP_STEPS:
            self.timed_steps += 1

    @contextmanager
    def untimed(self) -> Iterator[None]:
        """Wrap evaluation and saving, which do not count as training time."""
        self.seconds += self.lap()
        yield
        self.lap()

    @contextmanager
    def saving(self, step: int) -> Iterator[None]:
        """Wrap a save and log how long it interrupts training."""
        with self.untimed():
            yield
            seconds = time.perf_counter() - self.lap_start  # the device had finished the steps before
        self.write({"kind": "save", "step": step, "save_ms": 1e3 * seconds})

    def lap(self) -> float:
        """Seconds since the last lap, including queued device work."""
        synchronize(self.ranks.device)
        previous, self.lap_start = self.lap_start, time.perf_counter()
        return self.lap_start - previous

    def log_step(self, step: int, step_metrics: dict[str, Any]) -> None:
        """One row, with the mean speed since the row before. A collective; only rank 0 waits for the means."""
        # FSDP2's shards are joined. All is kept, because the loss is in use until the other ranks have read it.
        self.logged = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in step_metrics.items()}
        means = [self.ranks.start_mean(value) for name, value in self.logged.items() if name in OF_ONE_RANK]
        if self.ranks.main:
            for mean in filter(None, means):
                mean.wait()
            self.write_step(step, self.logged)
        if self.stragglers and (by_rank := self.stragglers.measure(step)):
            self.write({"kind": "ranks", "step": step, "matmul_ms": by_rank})
            for line in self.stragglers.newly_slow():
                self.say(f"step {step}: {line}")

    def write_step(self, step: int, step_metrics: dict[str, Any]) -> None:
        self.seconds += self.lap()
        seconds = self.seconds / self.timed_steps if self.timed_steps else None
        past = time.perf_counter() - self.first_timed  # with the evaluations and checkpoints since then
        row = {
            "kind": "train",
            "step": step,
            **{name: value.item() if torch.is_tensor(value) else value for name, value in step_metrics.items()},
            "tokens": (step + 1) * self.tokens_per_step,
            "progress": (step + 1) / self.end,
            "eta_seconds": seconds and past / (self.steps - WARM_UP_STEPS) * (self.end - step - 1),
            "step_ms": seconds and seconds * 1e3,
            "tokens_per_second": seconds and self.tokens_per_step / seconds,
            "mfu": self.flops_per_step / seconds / self.peak_flops if seconds and self.peak_flops else None,
            "peak_memory_bytes": peak_memory_bytes(self.ranks.device),
        }
        self.seconds, self.timed_steps = 0.0, 0
        self.write(row)
        self.show(row)

    def show(self, row: dict[str, Any]) -> None:
        text = f"{self.step_label(row['step'])} {abbreviate(row['tokens']):>6} tok loss {row['loss']:.4f}"
        text += f" lr {row['lr']:.1e}" + ("" if row["grad_norm"] is None else f" norm {row['grad_norm']:.2f}")
        if rate := row["tokens_per_second"]:
            text += f" {row['step_ms']:>6,.1f} ms {rate:>6,.0f} tok/s"
            if row["mfu"] is not None:
                text += f" MFU {100 * row['mfu']:.0f} %"
            text += f" ETA {duration(row['eta_seconds'])}"
        self.say(text)

    def step_label(self, step: int) -> str:
        """ "step  20/800 (  2 %)"; as wide for every step of a run."""
        total = f"{self.end:,}"
        return f"step {step:>{len(total)},}/{total} ({100 * step // self.end:>3} %)"

    def log_evaluation(self, step: int, losses: dict[str, float]) -> None:
        bits_per_byte = self.dataset.bits_per_byte(losses["val_loss"])
        self.write({"kind": "eval", "step": step, **losses, "val_bpb": bits_per_byte})
        self.say(f"{self.step_label(step)} train loss {losses['train_loss']:.4f} val loss {losses['val_loss']:.4f}")

    def say(self, text: str) -> None:
        if self.ranks.main:
            print(text, flush=True)

    def write(self, row: dict[str, Any]) -> None:
        if self.recording:
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            for tracker in self.trackers:
                tracker.log(row)

    def close(self, best_val_loss: float) -> None:
        """Draw loss.png, and say what the run reached and how to continue it."""
        for tracker in self.trackers:
            tracker.call(tracker.finish)
        if self.recording and self.path.exists():  # it does not if the first evaluation was stopped
            figure = new_figure(8, 5)
            plot_losses(figure.add_subplot(), [self.path.parent])
            figure.savefig(self.path.with_name("loss.png"))
            if self.cfg.benchmark:
                from training.speed import summarize_benchmark

                self.say(summarize_benchmark(self.path))
            elif self.first_step + self.steps >= self.end:
                self.say_end(best_val_loss)

    def say_end(self, best_val_loss: float) -> None:
        out, step = self.cfg.out_dir, self.first_step + self.steps
        text = f"the run was at step {step:,} already, and max_iters is {self.end:,}"
        if self.steps:
            text = f"finished step {step:,} after {duration(time.perf_counter() - self.start_time)}"
        if math.isfinite(best_val_loss):
            text += f"; best val loss {best_val_loss:.4f}"
        script = "the same launcher with" if self.ranks.world_size > 1 else f"python {Path(sys.argv[0]).name}"
        self.say(f"{text}; everything is in {out}, the loss curve in {self.path.with_name('loss.png')}")
        self.say(f"  sample:   python sample.py --out_dir={out}")
        self.say(f"  continue: {script} --init_from=resume --out_dir={out} --max_iters={2 * step}")


def abbreviate(number: float) -> str:
    """ "512", "22.5k", "1.5M", "294.9B"."""
    power = len(f"{number:.0f}") - 1 if number else 0
    return f"{number / 1000 ** (power // 3):.{1 if power > 2 else 0}f}{('', 'k', 'M', 'B', 'T')[power // 3]}"


def duration(seconds: float) -> str:
    """ "45 s", "12 min", "20 h"."""
    if seconds < 7200:
        return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:,.0f} h"


def start_line(cfg: TrainConfig, ranks: Ranks, init: InitState, dtype: torch.dtype) -> str:
    """Model, devices, and tokens per step with all factors, the setting that users of few GPUs most often get wrong."""
    accumulation, sequences, length = cfg.gradient_accumulation_steps, cfg.batch_size, cfg.block_size
    where = f"{ranks.world_size} x {ranks.device.type}" if ranks.world_size > 1 else str(ranks.device)
    data_ranks, layout = count(ranks.data_size, "rank"), ""
    if ranks.layout != Layout():
        from training.parallel import describe

        data_ranks, layout = count(ranks.data_size, "data-parallel rank"), f"; {describe(ranks)}"
    return (
        f"{init.model.parameter_count():,} parameters on {where}, {str(dtype).removeprefix('torch.')}{layout}; "
        f"{accumulation * sequences * length:,} tokens per step = {data_ranks} x "
        f"{count(accumulation // ranks.data_size, 'micro-step')} x {count(sequences, 'sequence')} x {length} tokens"
        + (f"; resuming {init.checkpoint}" if init.checkpoint else "")
        + ("; the first step compiles the model" if cfg.compile else "")
    )
