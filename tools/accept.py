"""The acceptance run: one command that says whether this code is right and fast on this machine.

    python -m tools.accept --peer=../nanoGPT
    python -m tools.accept --only=fp32,resume,zero2_124m
    python -m tools.accept --device=cpu

On a GPU, every strategy is compared with the CPU; then speed and memory are measured. With --device=cpu the same stages
run at tiny size. The command makes its own data set and downloads nothing. A stage that fails does not stop the others;
Ctrl-C keeps the results so far. Exit status: 0 if all stages passed, 1 if one failed or was not run, 2 for a wrong
option.
"""

import json
import os
import re
import shutil
import signal
import sys
import tempfile
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import DEVNULL, STDOUT, Popen, SubprocessError, TimeoutExpired, run
from time import monotonic
from typing import Any

import numpy as np
import torch

from data.dataset import open_dataset
from data.prepare import Writer
from data.tokenizer import Tokenizer, tokenizer_from
from launch.machine import free_port
from tools.benchmark_launches import explain
from tools.plan import RecipeConfig
from tools.plan_formulas import Candidate, Machines
from tools.terminal import make_parser, underscored
from training import distributed
from training.config import ROOT, parse
from training.errors import UserError
from training.figures import read_rows
from training.gpus import find_device
from training.run_folder import git, processor, versions
from training.speed import summarize
from training.strategies import find_strategy

HALF_ON_CPUS = "bfloat16"  # float16 once train.py accepts it there
TINY = " --n_layer=2 --n_head=2 --n_embd=32 --block_size=32 --batch_size=4 --compile=False"  # sizes on CPUs
ZEROS = ("zero2", "zero3", "zero1", "zero0")  # by importance
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # for scripts: the same Python
MEASURED = ("H100", "H200")  # GPUs that must reach the targets; on others they are only reported
OF_PLAN = (0.9, 1.1)  # a target: peak memory over the planner's estimate
FORMS = {"loss difference": ".1e", "norm difference": ".1e", "tokens/s": ",.0f", "MFU": ".1%", "ratio": ".2f"}
FORMS |= {"ms/step": ",.1f", "peak GB": ".2f", "of plan": ".2f"}  # the numbers of a stage


@dataclass(frozen=True)
class Stage:
    name: str
    group: str  # "alone": one at a time; all others run side by side on a GPU
    limit: float  # seconds until it is killed: about twice what it takes on an H100
    strategy: str  # "": arguments is the whole command, and {out} its folder
    arguments: str
    like: str = ""  # the stage whose losses it must have
    within: float = 0.0
    after: str = ""  # the stage that it needs; training resumes a copy of that run, from its last checkpoint but one
    prints: str = ""  # pattern of a line that it must print
    status: int = 0  # that it must exit with
    at_least: dict[str, float] = field(default_factory=dict)  # targets on MEASURED GPUs

    def command(self, folder: Path) -> list[str]:
        words = self.arguments.replace("{out}", str(folder)).split()
        if self.strategy:
            strategy = find_strategy(self.strategy)
            words = [strategy.script, *words, *strategy.arguments, f"--out_dir={folder}"]
        return words if words[0].startswith("./") else [sys.executable, *words]


def correctness(gpu: bool, data: Path, gpt2: str) -> list[Stage]:
    """Losses, resuming, what a user does first: name, group, limit, strategy, arguments, and what must hold."""
    device, steps, save = ("cuda", 40, 30) if gpu else ("cpu", 8, 6)
    tiny = f"config/train_debug.py --dataset={data} --device={device} --max_iters={steps} --lr_decay_iters={steps}"
    tiny += f" --warmup_iters=5 --eval_interval={save} --eval_iters=2 --log_interval=1{'' if gpu else TINY}"
    fp32, bf16 = f"{tiny} --dtype=float32 --tf32=False", f"{tiny} --dtype=bfloat16"
    fp16, jit = f"{tiny} --dtype={'float16' if gpu else HALF_ON_CPUS}", f"{bf16} --compile={gpu}"
    near, same, half = (1e-4, 1e-5, 0.05) if gpu else (1e-5, 0.0, 0.05)  # largest difference of a loss
    again, plain = f"{fp32} --init_from=resume", ("single", "fsdp")
    quick = f"--device={device} --out_dir={{out}} --max_iters=150 --lr_decay_iters=150"
    quick = quick if gpu else f"1 {quick} --warmup_iters=5 --eval_iters=4{TINY}"
    # On a GPU logits of 105 GB, on CPUs more bytes than there are addresses.
    huge = "--batch_size=1024" if gpu else "--batch_size=2147483647 --gradient_accumulation_steps=1000000"
    return [
        Stage("cpu", "fp32", 90, "single", f"{fp32} --device=cpu"),
        Stage("zero2_offload", "fp32", 240, "zero2_offload", fp32, "cpu", near),  # early: it compiles CPUAdam
        Stage("ddp", "fp32", 90, "ddp", f"{fp32} --strategy=ddp", "cpu", near),
        *(Stage(name, "fp32", 90, name, fp32, "cpu", near) for name in (*plain, *ZEROS, "fsdp_offload")),
        *(Stage(f"fp16_{name}", "half", 90, name, fp16, "cpu", half) for name in (*plain, "zero0", "zero2", "zero3")),
        *(Stage(f"bf16_{name}", "half", 90, name, bf16, "cpu", half) for name in ("single", "zero0", "zero3")),
        *(Stage(f"compile_{name}", "compile", 150, name, jit, "cpu", half) for name in (*plain, "zero2")),
        Stage("zero3_offload", "fp32", 240, "zero3_offload", fp32, "cpu", near),
        *(Stage(f"gloo_{name}", "gloo", 120, name, fp32, "cpu", near) for name in ("ddp", "fsdp", *ZEROS[:3])),
        *(Stage(f"resume_{name}", "resume", 90, name, again, name, same, name) for name in (*plain, "zero2")),
        Stage("zero3_as_single", "resume", 90, "single", again, "cpu", near, "zero3"),
        Stage("single_as_zero2", "resume", 90, "zero2", again, "cpu", near, "single"),
        Stage("fsdp_as_zero3", "resume", 90, "zero3", again, "cpu", near, "fsdp"),
        Stage("async_save", "resume", 90, "single", f"{fp32} --async_save=True", "single", same),
        Stage("resume_async_save", "resume", 90, "single", again, "single", same, "async_save"),
        Stage("quickstart", "user", 120, "", f"./launch_quickstart.sh {quick}", prints="^The "),
        Stage("sample", "user", 60, "", f"sample.py --out_dir={{out}}/../quickstart", "", 0, "quickstart", "^---"),
        Stage("memory", "alone", 60, "single", f"{gpt2} --benchmark {huge}", prints="try, in this order", status=2),
    ]


def speed(gpu: bool, gpt2: str, peer: str) -> list[Stage]:
    """Alone on the device, the most important first, because the time may not suffice for all."""
    bench = f"-m tools.benchmark --strategies=single --gpus=1 --speed {peer} --steps=25 --write={{out}}"
    eager = f"{gpt2} --benchmark --steps=15 --gradient_accumulation_steps=4 --compile=False"
    large = f"{gpt2} --benchmark --steps=8 --gradient_accumulation_steps=2 --batch_size="
    medium = large.replace("gpt2.py", "gpt2_medium.py") + ("16" if gpu else "4")
    xl = large.replace("gpt2.py", "gpt2_xl.py") + ("8" if gpu else "4") + " --activation_checkpointing=False"
    best, ratio = {"MFU": 0.45, "ratio": 1.3}, {"ratio": 0.95}  # to nanoGPT; to the stage that it is like
    return [
        Stage("124m", "alone", 200, "", f"{bench} {gpt2} --gradient_accumulation_steps=4", at_least=best),
        Stage("xl_fsdp", "alone", 120, "fsdp", xl, at_least={"MFU": 0.5}),
        Stage("eager_124m", "alone", 45, "single", eager),
        *(Stage(f"{z}_124m", "alone", 50, z, eager, "eager_124m", 0.1, at_least=ratio) for z in ZEROS),
        Stage("medium", "alone", 90, "single", medium),
        Stage("xl_zero2", "alone", 110, "zero2", f"{xl} --compile=False", "xl_fsdp", 0.1),
    ]


class Acceptance:
    """Runs stages in the order of the table for so many minutes. gpu: its name, or "" on CPUs, one stage at a time."""

    def __init__(self, folder: Path, write: Path | None, gpu: str = "", minutes: float = 9.0):
        self.folder, self.write, self.gpu, self.minutes, self.since = folder, write, gpu, minutes, monotonic()
        self.results: dict[str, dict[str, Any]] = {}
        self.futures: dict[str, Future] = {}
        self.processes: list[Popen] = []
        self.stopped = False

    def say(self, *lines: str) -> None:
        """Print lines, and add them to summary.txt."""
        text = f"[{monotonic() - self.since:4.0f} s] " + "\n         ".join(lines)
        print(text, flush=True)
        if self.write:
            with (self.write / "summary.txt").open("a") as file:
                file.write(text + "\n")

    def run(self, stages: list[Stage]) -> bool:
        """Whether none failed. Ctrl-C kills what is running; what is waiting is not run."""
        for alone in (False, True):
            pool = ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2) if self.gpu and not alone else 1)
            mine = [stage for stage in stages if (stage.group == "alone") == alone]
            self.futures |= {stage.name: pool.submit(self.perform, stage) for stage in mine}
            try:
                pool.shutdown()
            except KeyboardInterrupt:
                self.stopped = True
                kill(self.processes)
                pool.shutdown()
        return all(result["status"] in ("ok", "too large") for result in self.results.values())

    def perform(self, stage: Stage) -> None:
        """Run a stage, judge it, and print its line; of a failed one also the end of its log."""
        since, folder, log = monotonic(), self.folder / stage.name, self.folder / f"{stage.name}.log"
        result = self.results[stage.name] = {"group": stage.group, "status": "ok", "reason": ""}
        try:
            self.launch(stage, folder, log, result)
            self.measure(stage, folder, result)
            self.judge(stage, result)
        except SubprocessError as failure:
            result["status"], result["reason"] = failure.args
        except (OSError, ValueError, LookupError) as error:  # what it should have written is missing or damaged
            result |= {"status": "FAILED", "reason": f"{type(error).__name__}: {error}"}
        result["seconds"] = round(monotonic() - since, 1)
        numbers = [f"{name} {result[name]:{form}}" for name, form in FORMS.items() if result.get(name) is not None]
        words = ", ".join([f"{result['seconds']} s", *filter(None, [result["reason"]]), *numbers])
        lines = log.read_text(errors="replace").splitlines()[-200:] if log.exists() else []
        if result["status"] == "FAILED" and self.write:
            (self.write / log.name).write_text("\n".join(lines) + "\n")
        self.say(f"{stage.name}: {result['status']}, {words}", *(lines[-5:] if result["status"] == "FAILED" else ()))

    def launch(self, stage: Stage, folder: Path, log: Path, result: dict[str, Any]) -> None:
        """Run it to its end, or to its limit. Raises SubprocessError(status, reason)."""
        for name in filter(None, (stage.after, stage.like)):
            self.futures[name].result()
            if self.results[name]["status"] != "ok":
                raise SubprocessError("not run", f"{name}, which it needs, is not ok")
        left = 60 * self.minutes + self.since - monotonic()
        if self.stopped or left < stage.limit / 2:
            raise SubprocessError("not run", f"interrupted, or only {max(0, left):.0f} s of {self.minutes:g} min left")
        lines = [stage.command(folder)]
        result["command"] = " ".join(lines[0][1:]).replace(str(self.folder), "$OUT")
        if stage.group == "alone" and stage.strategy and not stage.status:
            self.fit(stage, lines[0][2:], result)
        if stage.after and stage.strategy:
            shutil.copytree(self.folder / stage.after, folder)
            shutil.rmtree(max((folder / "checkpoints").glob("step_*")))
        folder.mkdir(exist_ok=True)
        if stage.group == "gloo":  # two nodes of one rank, which share a GPU; NCCL would refuse
            nodes = f"-m launch.ranks --nnodes=2 --master_addr=127.0.0.1 --master_port={free_port(host='127.0.0.1')}"
            words = [*lines[0][1:], "--backend=gloo"]
            lines = [[sys.executable, *nodes.split(), f"--node_rank={node}", "1", *words] for node in (0, 1)]
        self.say(f"{stage.name}: started, {stage.limit:.0f} s at most, {left:.0f} s left for all")
        env = os.environ | ({} if lines[0][0] == sys.executable else {"PATH": PATH})
        with log.open("w") as file:
            to: dict[str, Any] = {"stdin": DEVNULL, "stdout": file, "stderr": STDOUT}
            processes = [Popen(line, cwd=ROOT, env=env, start_new_session=True, **to) for line in lines]
        self.processes += processes
        try:
            for process in processes:
                process.wait(min(stage.limit, left))
        except TimeoutExpired:
            raise SubprocessError("FAILED", f"killed after its limit, {min(stage.limit, left):.0f} s") from None
        finally:
            kill(processes)
        if self.stopped:
            raise SubprocessError("not run", "interrupted")
        text = log.read_text(errors="replace")
        if wrong := [process.returncode for process in processes if process.returncode != stage.status]:
            raise SubprocessError("FAILED", f"status {wrong[0]}: {explain(text.splitlines(), wrong[0]).args[1]}")
        if not re.search(stage.prints or ("resuming" if stage.after else ""), text, re.M):
            raise SubprocessError("FAILED", f"does not print {stage.prints or 'resuming'!r}")

    def fit(self, stage: Stage, words: list[str], result: dict[str, Any]) -> None:
        """Note the planner's estimate of tensors; raises SubprocessError if the GPU has less."""
        cfg, on = parse(RecipeConfig, words, ""), ("H100", "bfloat16") if self.gpu else ("cpu", "float32")
        rates = dict.fromkeys(("gpu_memory", "memory_bandwidth", "tflops", "node_link"), 1.0)
        machine = Machines(gpus=1, device=on[0], dtype=on[1], baseline=0.0, fragmentation=0.0, **rates)
        model, strategy = cfg.model_config(open_dataset(Path(cfg.dataset)).vocab_size), find_strategy(stage.strategy)
        batch = cfg.batch_size, cfg.gradient_accumulation_steps, cfg.activation_checkpointing
        result["planned GB"] = Candidate(model, strategy, machine, *batch).memory / 1e9
        if self.gpu and (size := torch.cuda.get_device_properties(0).total_memory / 1e9) < result["planned GB"]:
            raise SubprocessError("too large", f"needs {result['planned GB']:.0f} GB, the GPU has {size:.0f}")

    def measure(self, stage: Stage, folder: Path, result: dict[str, Any]) -> None:
        """Add the numbers of FORMS, and the fall of the validation loss."""
        if (folder / "benchmark.json").exists():
            ours, *peer = json.loads((folder / "benchmark.json").read_text())["rows"]
            result |= {"tokens/s": ours["tokens_per_second"], "MFU": ours["mfu"], "ms/step": ours["step_ms"]}
            result |= {"ratio": ours["tokens_per_second"] / peer[0]["tokens_per_second"]} if peer else {}
        if not (folder / "metrics.jsonl").exists():
            return
        rows = steps(folder)
        timed = summarize(list(rows.values()))
        result |= {"ms/step": timed["step_ms"], "peak GB": timed["peak_memory_bytes"] / 1e9}
        if stage.group == "alone":
            result |= {"tokens/s": timed["tokens_per_second"], "MFU": timed["mfu"]}
            result["of plan"] = result["peak GB"] / result["planned GB"]
        if stage.like:
            other = steps(self.folder / stage.like)
            pairs = [(rows[step], other[step]) for step in other]  # KeyError: a step is missing
            result["loss difference"] = float(np.max([abs(a["loss"] - b["loss"]) for a, b in pairs]))
            norms = [abs(a["grad_norm"] / b["grad_norm"] - 1) for a, b in pairs]
            result["norm difference"] = float(np.max(norms))
            if stage.group == "alone":
                result["ratio"] = result["tokens/s"] / self.results[stage.like]["tokens/s"]
        losses = [row["val_loss"] for _, row in read_rows(folder / "metrics.jsonl") if row["kind"] == "eval"]
        if losses and not losses[-1] < losses[0]:
            raise SubprocessError("FAILED", f"val loss goes from {losses[0]:.4f} to {losses[-1]:.4f}")

    def judge(self, stage: Stage, result: dict[str, Any]) -> None:
        """Raise SubprocessError where a loss or, on MEASURED GPUs, a target is missed."""
        if stage.like and not result["loss difference"] <= stage.within:  # also if it is NaN
            raise SubprocessError("FAILED", f"loss differs from {stage.like}'s by more than {stage.within:g}")
        if find_device(self.gpu) not in MEASURED:
            return
        bounds = {key: (least, np.inf) for key, least in stage.at_least.items()} | {"of plan": OF_PLAN}
        for key, (low, high) in bounds.items():
            if result.get(key) is not None and not low <= result[key] <= high:
                raise SubprocessError("FAILED", f"{key} must be from {low:g} to {high:g}")


def kill(processes: list[Popen]) -> None:
    """With all that they started."""
    for process in processes:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()  # a new process may not have its group yet
        process.wait()


def steps(folder: Path) -> dict[int, dict[str, Any]]:
    return {row["step"]: row for _, row in read_rows(folder / "metrics.jsonl") if row["kind"] == "train"}


def write_data(folder: Path, tokenizer: Tokenizer, tokens: int) -> None:
    """Ids with something to learn: every other one follows from the id before it."""
    random, size = np.random.default_rng(0), tokenizer.vocab_size
    with Writer(folder, tokenizer, "tools.accept") as writer:
        for split, count in (("train", tokens), ("val", tokens // 8)):
            new = np.minimum(random.zipf(1.2, count), size) - 1
            writer.write(split, np.where(random.random(count) < 0.5, new, (31 * np.roll(new, 1) + 7) % size), end=False)


def machine(gpu: str) -> dict[str, Any]:
    about = {"device": gpu or processor(), "gpus": torch.cuda.device_count(), "commit": git("rev-parse", "HEAD")}
    about |= versions() | {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    if gpu:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        about["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        about["driver"] = run(query, capture_output=True, text=True, check=False).stdout.split("\n")[0]
    return about


def page(about: dict[str, Any], results: dict[str, dict[str, Any]]) -> str:
    """README.md: a table of what was compared, one of what ran alone, and the reasons of what is not ok."""
    lines = [f"# Acceptance on {about['device']}", "", ", ".join(f"{key} {value}" for key, value in about.items())]
    for title, alone in (("Correctness", False), ("Speed", True)):
        rows = {name: result for name, result in results.items() if (result["group"] == "alone") == alone}
        names = [key for key in FORMS if any(result.get(key) is not None for result in rows.values())]
        lines += [
            "",
            f"## {title}",
            "",
            f"| stage | result | s | {' | '.join(names)} |",
            "|---" * (3 + len(names)) + "|",
        ]
        for name, result in rows.items():
            cells = [f"{result[key]:{FORMS[key]}}" if result.get(key) is not None else "" for key in names]
            lines.append(f"| {' | '.join([name, result['status'], str(result['seconds']), *cells])} |")
    reasons = [f"- {name}: {result['reason']}" for name, result in results.items() if result["reason"]]
    return "\n".join([*lines, "", "## Not ok", "", *(reasons or ["Nothing."])]) + "\n"


def choose(stages: list[Stage], prefixes: list[str]) -> list[Stage]:
    """Those whose name or group begins with one of the prefixes, and what they need."""
    for prefix in prefixes:
        if not any(text.startswith(prefix) for stage in stages for text in (stage.name, stage.group)):
            names = ", ".join(dict.fromkeys([*(stage.group for stage in stages), *(stage.name for stage in stages)]))
            raise UserError(f"--only={prefix}: no stage or group begins so; there are {names}")
    chosen = {
        stage.name
        for stage in stages
        if stage.name.startswith(tuple(prefixes)) or stage.group.startswith(tuple(prefixes))
    }
    for stage in reversed(stages):
        if stage.name in chosen:
            chosen |= {stage.like, stage.after}
    return [stage for stage in stages if stage.name in chosen]


def main() -> None:
    parser = make_parser("accept", __doc__ or "")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: tiny, and without targets")
    parser.add_argument("--peer", type=Path, help="a checkout of nanoGPT, whose train.py is timed as well")
    parser.add_argument("--write", type=Path, help="folder for the results; default: results/gpu_NAME, on CPUs none")
    parser.add_argument("--only", default="", help="prefixes of names or groups of stages, with commas between")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all; stages that would not fit are not run")
    args = parser.parse_args(underscored(sys.argv[1:]))
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device=cuda: no GPU is visible; --device=cpu runs the same stages at tiny size")
    gpu = torch.cuda.get_device_name(0) if args.device == "cuda" else ""
    write = args.write or (ROOT / "results" / f"gpu_{re.sub('[^a-z0-9]+', '_', gpu.lower())}" if gpu else None)
    if write:
        write.mkdir(parents=True, exist_ok=True)
        (write / "summary.txt").unlink(missing_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="accept-") as temporary:
        folder = Path(temporary)
        acceptance = Acceptance(folder, write, gpu, args.minutes)
        write_data(folder / "data", tokenizer_from({"name": "gpt2" if gpu else "byte"}), 8_000_000 if gpu else 50_000)
        gpt2 = f"config/train_gpt2.py --dataset={folder / 'data'}{'' if gpu else TINY + ' --device=cpu'}"
        peer = f"--peer={args.peer.resolve()}" if args.peer else ""
        stages = [*correctness(bool(gpu), folder / "data", gpt2), *speed(bool(gpu), gpt2, peer)]
        passed = acceptance.run(choose(stages, args.only.split(",")))
    about = machine(gpu)
    if write:
        (write / "accept.json").write_text(
            json.dumps({"machine": about, "stages": acceptance.results}, indent=1) + "\n"
        )
        (write / "README.md").write_text(page(about, acceptance.results))
    counts = Counter(result["status"] for result in acceptance.results.values())
    acceptance.say(", ".join(f"{number} {status}" for status, number in counts.items()))
    sys.exit(not passed)


if __name__ == "__main__":
    distributed.run(main)
