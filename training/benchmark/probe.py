"""Inside a rank: a train script of a few steps, watched from within, that notes memory, time and checkpoints.

    python launch.py 2 benchmark.py --inside notes train_deepspeed.py config/train_debug.py --deepspeed_config=...

benchmark.py launches it. Every rank writes notes/rank_0.json and so on. The script is the real one; its Trainer's steps
and saves are watched. With --memory before the folder, memory only; with --training, too, but of a run that evaluates
before its first step, as training does.
"""

import contextlib
import importlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.profiler import ProfilerActivity, profile, record_function

from model import GPT
from training.benchmark import breakdown, census
from training.benchmark.ceiling import ceiling
from training.devices import peak_memory_bytes
from training.memory import model_state
from training.saving import Files, Saver
from training.sharding import copy_ranks

COUNTED, PEAK, TRACED = 1, 2, (4, 5, 6)  # steps: in which tensors are counted, after which the peak is read
LEAST = 5  # steps of a run with --benchmark
RUNS = {"--memory": ("--benchmark", f"--steps={LEAST}"), "--training": (f"--max_iters={PEAK + 1}",)}  # memory only
PROFILER_ON = TRACED[0] - 1  # a step ahead: it starts earlier on one rank than on another


class Probe:
    """What is noted of this rank, and where in the script it is."""

    def __init__(self, memory_only: bool):
        self.note: dict[str, Any] = {"counts": []}
        self.steps = LEAST if memory_only else TRACED[-1] + 1
        self.now, self.wall_ms, self.trainer = 0, [], None  # type: int, list[float], Any
        self.profile: profile | None = None

    def synchronize(self) -> None:
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()

    def marked(self, name: str, call: Callable) -> Callable:
        """call, with a mark in the trace around it; the device's work is awaited at both ends."""

        def marking(*args: Any, **kwargs: Any) -> Any:
            if self.now not in TRACED:
                return call(*args, **kwargs)
            self.synchronize()
            with record_function(name):
                result = call(*args, **kwargs)
                self.synchronize()
            return result

        return marking

    def built(self, trainer: Any) -> None:
        """Hooks into what the strategy has made."""
        self.trainer = trainer
        if engine := getattr(trainer, "engine", None):
            engine.backward = self.marked("backward", engine.backward)
            update = engine.step

            def step() -> None:
                self.count()
                update()

            engine.step = step
            for swapper in census.swappers(trainer.model, trainer.optimizer):
                for name in (n for n in dir(swapper) if n.startswith(("swap_", "synchronize_", "writeback_"))):
                    if callable(call := getattr(swapper, name)):
                        setattr(swapper, name, self.marked("swap", call))
        else:
            register_optimizer_step_pre_hook(lambda *_: self.count())

    def count(self) -> None:
        if self.now == COUNTED:
            model, optimizer, device = self.trainer.model, self.trainer.optimizer, self.trainer.ranks.device.type
            found = {where: census.count(model, optimizer, where) for where in {device, "cpu"}}
            self.note["counts"].append(found)

    def step(self, number: int, take: Callable) -> Any:
        self.now = number
        if number == PROFILER_ON and self.steps > LEAST:
            kinds = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * torch.cuda.is_available()]
            self.profile = profile(activities=kinds)
            self.profile.start()
        since = time.perf_counter()
        result = self.marked("step", take)(number)
        if number in TRACED:
            self.wall_ms.append((time.perf_counter() - since) * 1e3)
        if number == PEAK:
            self.peaks()
        if self.profile and number == TRACED[-1]:
            self.profile.stop()
        return result

    def peaks(self) -> None:
        """Bytes. host: resident; device: allocated, where it is a GPU; interpreter: resident before the model was."""
        device = self.trainer.ranks.device
        self.note["peak_host_bytes"] = peak_memory_bytes(torch.device("cpu"))
        self.note["peak_device_bytes"] = peak_memory_bytes(device) if device.type == "cuda" else None

    def finish(self) -> dict[str, Any]:
        """After the run."""
        trainer = self.trainer
        counts = max(self.note.pop("counts"), key=lambda found: sum(sum(kinds.values()) for kinds in found.values()))
        config = trainer.model.config
        accumulation = getattr(trainer, "engine", None) and trainer.engine._config.grad_accum_dtype == "fp32"
        size, ranks = config.parameter_count(), copy_ranks(trainer.cfg, trainer.ranks)
        state = model_state(trainer.strategy, ranks, size, trainer.dtype, bool(accumulation))
        self.note |= {
            "memory": counts,
            "device": trainer.ranks.device.type,
            "expected_bytes": round(state.total()),
            "parameter_count": size,
        }
        self.note |= {"flops_per_token": config.flops_per_token(), "dtype": str(trainer.dtype).removeprefix("torch.")}
        if self.profile:
            with tempfile.TemporaryDirectory() as folder:
                trace = Path(folder) / "trace.json"
                self.profile.export_chrome_trace(str(trace))
                steps = breakdown.parts(breakdown.events(trace))
            self.note |= {"breakdown_ms": breakdown.mean(steps), "wall_ms": sum(self.wall_ms) / len(self.wall_ms)}
            self.note["ceiling_flops"] = ceiling(trainer.ranks.device, trainer.dtype)
        return self.note


def resident_bytes() -> int:
    """Of this process, now; 0 where the system does not say."""
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def watch(script: Any, probe: Probe) -> None:
    """The script's Trainer, the model, the backward pass, and the writing of checkpoints."""

    class Watched(script.Trainer):
        def __init__(self, *arguments: Any):
            super().__init__(*arguments)
            probe.built(self)

        def train_step(self, step: int) -> Any:
            return probe.step(step, super().train_step)

    build, writing = GPT.__init__, Saver.writing

    def before_the_model(self: GPT, *arguments: Any) -> None:
        probe.note.setdefault("interpreter_bytes", resident_bytes())
        build(self, *arguments)

    @contextmanager
    def timed(self: Saver, *arguments: Any) -> Iterator[Files]:
        since = time.perf_counter()
        with writing(self, *arguments) as files:
            yield files
        probe.note["checkpoint_s"] = time.perf_counter() - since
        self.wait()
        written = self.checkpoints.whole()[-1].rglob("*")
        probe.note["checkpoint_bytes"] = sum(path.stat().st_size for path in written if path.is_file())

    GPT.__call__ = probe.marked("forward", GPT.__call__)  # type: ignore[method-assign, assignment]
    Tensor.backward = probe.marked("backward", Tensor.backward)  # type: ignore[method-assign]
    Saver.writing = timed  # type: ignore[method-assign, assignment]
    GPT.__init__ = before_the_model  # type: ignore[method-assign, assignment]
    script.Trainer = Watched


def main(arguments: list[str]) -> None:
    """arguments: [--memory or --training] FOLDER SCRIPT and the script's."""
    only = arguments[0] if arguments[0] in RUNS else ""
    folder, name, *rest = arguments[bool(only) :]
    script: Any = importlib.import_module(name.removesuffix(".py"))
    probe = Probe(bool(only))
    watch(script, probe)
    steps = RUNS.get(only, (f"--max_iters={probe.steps}",))
    sys.argv = [name, *rest, *steps, "--eval_interval=1000000", "--eval_iters=1", "--always_save_checkpoint=True"]
    script.main()
    Path(folder).mkdir(parents=True, exist_ok=True)
    note = json.dumps(probe.finish())
    (Path(folder) / f"rank_{probe.trainer.ranks.rank}.json").write_text(note)
