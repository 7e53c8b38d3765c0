"""Run control: requests to stop or save, NaN and inf losses, and hang detection with stack traces.

After every step the ranks share four numbers in one asynchronous all-reduce between CPUs, and act on the result a step
later, so that all act at the same step.
"""

import faulthandler
import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from training.checkpoint import Checkpoints
from training.config import ROOT, TrainConfig
from training.distributed import Ranks
from training.errors import HUNG, Stopped, UserError

PROCESS_START = time.monotonic()  # close enough for a time limit in minutes
HANDLED_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
DEADLINE, STOP_FILE = 1001, 1002  # reasons to stop, besides the signals' numbers
MAX_SKIPPED_STEPS = 30  # fp16 may skip this many in a row: the loss scale halves each time, from 65,536 down
COLLECTIVES = "torch/distributed/"  # in the path of the files that hold them
WAITING = ("act", "_engine_run_backward")  # a backward pass may wait for collectives in other threads
POLL_SECONDS = 0.5  # the watchdog looks at the clock this often
REPORT_SECONDS = 5.0  # all live ranks time out within this, because their clocks started at the same collective


class RunControl:
    """`stop`: why the run ends, known to all ranks; `save`: whether a checkpoint was requested."""

    def __init__(self, cfg: TrainConfig, ranks: Ranks, checkpoints: Checkpoints, dtype: torch.dtype):
        self.cfg, self.ranks, self.checkpoints = cfg, ranks, checkpoints
        self.stop, self.save = 0, False
        self.signal, self.signal_time = 0, 0.0
        self.max_bad_steps = MAX_SKIPPED_STEPS if dtype == torch.float16 else 1
        self.bad_steps = 0
        self.previous: StepNumbers | None = None  # of a step that is not shared yet
        self.shared: tuple[StepNumbers | None, Tensor, dist.Work | None] | None = None
        self.files = {name: Path(cfg.out_dir) / name for name in ("stop", "save")}
        self.watchdog = Watchdog(cfg, ranks)
        for signum in HANDLED_SIGNALS:
            signal.signal(signum, self.handle_signal)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED_SIGNALS)  # launch/ranks.py blocks SIGUSR1 during start-up

    def handle_signal(self, signum: int, _: object) -> None:
        now = time.monotonic()
        if signum == signal.SIGINT and self.signal and now > self.signal_time + 1:
            raise KeyboardInterrupt  # second request: stop immediately
        self.signal, self.signal_time = signum, now

    def step_done(self, step: int, loss: Tensor, grad_norm: Tensor | None) -> None:
        """A collective. Raises UserError on all ranks if the loss of an earlier step is NaN or inf."""
        self.poll()  # a GPU's numbers of the step before have arrived by now; those of this one would make it wait
        self.previous = StepNumbers(step, loss, grad_norm)

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Wrap a save: checks the last loss first, so that nothing is saved after a NaN; clears the request."""
        self.exchange()
        self.watchdog.beat("saving")
        yield
        if self.save and self.ranks.main:
            self.files["save"].unlink(missing_ok=True)
        self.save = False

    def exchange(self) -> None:
        """Share the last step's numbers and act on them now. A collective that waits for the device and all ranks."""
        self.poll()
        self.act()

    def poll(self) -> bool:
        """Act on what was shared by the last call, share anew, and return whether to stop. A collective."""
        self.act()
        numbers, self.previous = self.previous, None
        self.watchdog.beat(f"step {numbers.step}" if numbers else "")
        loss, norm = numbers.read() if numbers else (0.0, 0.0)
        save = self.ranks.main and self.files["save"].exists()
        largest = torch.tensor([self.stop_reason(), save, not math.isfinite(loss), not math.isfinite(norm)])
        alone = self.ranks.world_size == 1
        work = None if alone else dist.all_reduce(largest, dist.ReduceOp.MAX, self.ranks.control, async_op=True)
        self.shared = numbers, largest, work
        return bool(self.stop)

    def act(self) -> None:
        if self.shared is None:
            return
        (numbers, largest, work), self.shared = self.shared, None
        if work:
            work.wait()
        stop, save, *bad = largest.tolist()
        self.stop = self.stop or stop
        self.save = self.save or bool(save)
        if numbers:
            self.bad_steps = self.bad_steps + 1 if any(bad) else 0
            if self.bad_steps >= self.max_bad_steps:  # before, fp16 skips the step and lowers the loss scale
                self.raise_not_finite(numbers)

    def stop_reason(self) -> int:
        """This rank's: a signal's number, DEADLINE, STOP_FILE, or 0."""
        if self.signal or not self.ranks.main:
            return self.signal
        if 0 < self.cfg.max_minutes < (time.monotonic() - PROCESS_START) / 60:
            return DEADLINE
        return STOP_FILE if self.files["stop"].exists() else 0

    def raise_not_finite(self, numbers: "StepNumbers") -> None:
        loss, norm = numbers.read()
        bad = {rank: loss for rank, loss in enumerate(self.ranks.share(loss)) if not math.isfinite(loss)}
        where = ", ".join(f"{loss} on rank {rank}" for rank, loss in bad.items()) or "finite on every rank"
        intact = self.checkpoints.intact()
        restart = f"resume from {intact[-1]} with --init_from=resume and" if intact else "start again with"
        raise UserError(
            f"step {numbers.step}: loss {where}, gradient norm {norm}: stopped without saving this step; "
            f"{restart} a lower --learning_rate, more --warmup_iters, or another --seed"
        )

    def raise_stopped(self, saved_step: int) -> None:
        """Raises Stopped on all ranks. Removes the stop file, so that the next start does not see it."""
        if self.ranks.main:
            self.files["stop"].unlink(missing_ok=True)
        reasons = {DEADLINE: f"max_minutes = {self.cfg.max_minutes}", STOP_FILE: f"the file {self.files['stop']}"}
        reason = reasons[self.stop] if self.stop in reasons else signal.Signals(self.stop).name
        saved = f"saved at step {saved_step}; --resume=auto continues from there" if saved_step else "nothing to save"
        raise Stopped(f"stopped by {reason}: {saved}")


class StepNumbers:
    """Loss and gradient norm of a step, being copied from the device."""

    def __init__(self, step: int, loss: Tensor, grad_norm: Tensor | None):
        self.step = step
        numbers = [loss, torch.zeros(()) if grad_norm is None else grad_norm]  # an offloaded norm is on the CPU already
        self.host = [number.detach().to("cpu", non_blocking=number.is_cuda, copy=True) for number in numbers]
        self.event = torch.cuda.current_stream().record_event() if loss.is_cuda else None

    def read(self) -> list[float]:
        if self.event:
            self.event.synchronize()
        return [number.item() for number in self.host]


class Watchdog:
    """Ends a rank that makes no progress for hang_minutes; writes all its stacks to out_dir/hang/rank_00003.txt."""

    def __init__(self, cfg: TrainConfig, ranks: Ranks):
        self.ranks, self.limit = ranks, cfg.hang_minutes * 60
        self.folder = Path(cfg.out_dir) / "hang"
        self.paths = [self.folder / f"rank_{rank:05d}.txt" for rank in range(ranks.world_size)]
        self.last_event, self.last_beat = "the start", time.monotonic()
        if self.limit and not cfg.eval_only:
            threading.Thread(target=self.watch, name="watchdog", daemon=True).start()

    def beat(self, event: str = "") -> None:
        """Report progress; event: what was reached."""
        self.last_event, self.last_beat = event or self.last_event, time.monotonic()

    def watch(self) -> None:
        while time.monotonic() - self.last_beat <= self.limit:
            time.sleep(POLL_SECONDS)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self.paths[self.ranks.rank].open("w") as file:
                file.write(f"no progress for {self.limit:.0f} s after {self.last_event}\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            time.sleep(REPORT_SECONDS)
            self.report()
        except OSError as error:  # a full disk, or one that is gone
            text = f"rank {self.ranks.rank}: no progress for {self.limit:.0f} s after {self.last_event}"
            print(f"error: {text}; stacks cannot be written ({error})", file=sys.stderr, flush=True)
        finally:
            os._exit(HUNG)

    def report(self) -> None:
        """Printed by the lowest rank that is still alive. Files are compared by the clock of the file server."""
        since = self.paths[self.ranks.rank].stat().st_mtime - 2 * REPORT_SECONDS
        written = [rank for rank, path in enumerate(self.paths) if path.exists() and path.stat().st_mtime > since]
        if min(written) != self.ranks.rank:
            time.sleep(4 * POLL_SECONDS)  # when this rank ends, the collective of the rank that reports fails
            return
        places: dict[str, list[int]] = {}
        for rank in written:
            places.setdefault(stack_summary(self.paths[rank].read_text()), []).append(rank)
        groups = [f"{self.ranks.names(ranks)} {place}" for place, ranks in sorted(places.items())]  # "stuck" first
        if silent := [rank for rank in range(self.ranks.world_size) if rank not in written]:
            groups.insert(0, f"no sign of life from {self.ranks.names(silent)} (process, machine or network)")
        elif all(place.startswith("waiting") for place in places):
            groups.append("no rank is stuck elsewhere, so suspect the network or the device")
        text = f"no progress for {self.limit:.0f} s after {self.last_event}: {'; '.join(groups)}"
        print(f"error: {text}; all stacks: {self.folder}", file=sys.stderr, flush=True)


def stack_summary(text: str) -> str:
    """Where the main thread is stuck, or the collective in which it waits, and the line of this repository above it."""
    main_thread = text.split("(most recent call first):")[-1]  # the last one, innermost frame first
    stack = re.findall(r'File "([^"]+)", line (\d+) in (\S+)', main_thread) or [("", "", "?")]
    frames = [frame for frame in stack if Path(frame[0]).is_relative_to(ROOT) and "site-packages" not in frame[0]]
    collectives = [name for file, _, name in stack if COLLECTIVES in file and not name.startswith(("_", "wrapper"))]
    file, _, function = stack[0]
    state = "waiting" if COLLECTIVES in file or function in WAITING else "stuck"
    place = f" ({Path(frames[0][0]).name}:{frames[0][1]})" if frames else ""
    return f"{state} in {(collectives or [function])[0]}{place}"
