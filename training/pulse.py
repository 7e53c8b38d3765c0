"""The pulse of a run: after every step each rank tells the others how it is, and all act on it together.

That is one all-gather of four numbers on the CPU, whatever the device. What it brings: a request to stop or to save
reaches all ranks at the same step, whichever of them got it, and a loss that is no number is named with its rank.
"""

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor

from training.checkpoint import Checkpoints
from training.distributed import Ranks
from training.errors import Stopped, UserError
from training.train_config import TrainConfig
from training.watchdog import Watchdog

STARTED = time.monotonic()  # of this process, near enough for a deadline in minutes
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
DEADLINE, FILE = 1001, 1002  # reasons to stop, besides the signals' numbers
SKIPS = 30  # steps that fp16 may skip in a row: the loss scale halves each time, from 65,536 on


class Pulse:
    """`stop`: why the run is to end, once all ranks know; `save`: whether a checkpoint is wanted now."""

    def __init__(self, cfg: TrainConfig, ranks: Ranks, checkpoints: Checkpoints, dtype: torch.dtype):
        self.cfg, self.ranks, self.checkpoints = cfg, ranks, checkpoints
        self.stop, self.save = 0, False
        self.signal, self.signalled = 0, 0.0
        self.patience = SKIPS if dtype == torch.float16 else 1
        self.bad_steps = 0
        self.before: Numbers | None = None
        self.files = {name: Path(cfg.out_dir) / name for name in ("stop", "save")}
        self.watchdog = Watchdog(cfg, ranks)
        for signum in SIGNALS:
            signal.signal(signum, self.note)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # launch.py lets SIGUSR1 wait while a run starts

    def note(self, signum: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if signum == signal.SIGINT and self.signal and now > self.signalled + 1:
            raise KeyboardInterrupt  # asked for a second time: no more waiting
        self.signal, self.signalled = signum, now

    def step_done(self, step: int, loss: Tensor, grad_norm: Tensor | None) -> None:
        """A collective. Raises UserError on all ranks where a loss is no number: of this step, on a GPU the one before.

        That one is done by now, so nobody waits for the device.
        """
        now = Numbers(step, loss, grad_norm)
        self.exchange(self.before if self.ranks.device.type == "cuda" else now)
        self.before = now

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Around a save: nothing is kept that comes of a loss that is no number, and who asked for it sees it done."""
        self.watchdog.beat("saving")
        if self.ranks.device.type == "cuda":
            self.exchange(self.before)
            self.before = None
        yield
        if self.save and self.ranks.main:
            self.files["save"].unlink(missing_ok=True)
        self.save = False

    def exchange(self, numbers: "Numbers | None" = None) -> bool:
        """A collective; whether the run is to stop."""
        self.watchdog.beat(f"step {numbers.step}" if numbers else "")
        loss, norm = numbers.read() if numbers else (0.0, 0.0)
        told = self.ranks.gather([self.request(), self.wanted("save"), loss, norm])
        self.stop = self.stop or int(max(row[0] for row in told))
        self.save = self.save or any(row[1] for row in told)
        if numbers:
            self.judge(numbers.step, [row[2] for row in told], norm)
        return bool(self.stop)

    def request(self) -> int:
        minutes = (time.monotonic() - STARTED) / 60
        if self.signal or not self.ranks.main:
            return self.signal
        if self.cfg.max_minutes and minutes > self.cfg.max_minutes:
            return DEADLINE
        return FILE if self.wanted("stop") else 0

    def wanted(self, name: str) -> bool:
        return self.ranks.main and self.files[name].exists()

    def judge(self, step: int, losses: list[float], norm: float) -> None:
        bad = {rank: loss for rank, loss in enumerate(losses) if not math.isfinite(loss)}
        self.bad_steps = self.bad_steps + 1 if bad or not math.isfinite(norm) else 0
        if self.bad_steps < self.patience:  # in fp16 such a step was skipped, and the loss scale lowered
            return
        where = ", ".join(f"{loss} on rank {rank}" for rank, loss in bad.items()) or "finite on every rank"
        whole = self.checkpoints.whole()
        good = f"{whole[-1]} is whole: go on from it with --init_from=resume and" if whole else "start again with"
        raise UserError(
            f"step {step}: loss {where}, gradient norm {norm}: stopped, nothing of it was saved; "
            f"{good} a lower --learning_rate, more --warmup_iters, or another --seed"
        )

    def leave(self, step: int) -> None:
        """Raises Stopped on all ranks, the reason in it; the next start is not to find the file that asked."""
        if self.ranks.main:
            self.files["stop"].unlink(missing_ok=True)
        why = {DEADLINE: f"max_minutes = {self.cfg.max_minutes}", FILE: f"the file {self.files['stop']}"}
        reason = why[self.stop] if self.stop in why else signal.Signals(self.stop).name
        kept = f"saved at step {step}; --resume=auto goes on from there" if step else "nothing to save"
        raise Stopped(f"stopped by {reason}: {kept}")


class Numbers:
    """Loss and gradient norm of a step on their way from the device."""

    def __init__(self, step: int, loss: Tensor, grad_norm: Tensor | None):
        self.step = step
        numbers = [loss, torch.zeros(()) if grad_norm is None else grad_norm]  # an offloaded norm is on the CPU already
        self.host = [number.detach().to("cpu", non_blocking=number.is_cuda) for number in numbers]
        self.event = torch.cuda.Event() if loss.is_cuda else None
        if self.event:
            self.event.record()

    def read(self) -> list[float]:
        if self.event:
            self.event.synchronize()
        return [number.item() for number in self.host]
