"""Stages of the acceptance run, and how they are run and compared; tools/accept.py is its command."""

import json
import os
import re
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from subprocess import DEVNULL, STDOUT, Popen
from time import monotonic, sleep
from typing import Any

import numpy as np
import torch

from data.dataset import open_dataset
from data.prepare import Writer
from data.tokenizer import Tokenizer, tokenizer_from
from launch.machine import free_port
from tools.benchmark import explain
from tools.plan import RecipeConfig
from tools.plan_formulas import Candidate, Machines
from tools.terminal import make_parser
from training import distributed
from training.config import ROOT, parse
from training.errors import UserError
from training.figures import read_run
from training.gpus import find_device
from training.run_folder import environment
from training.speed import summarize
from training.strategies import find_strategy

TINY = " --n_layer=2 --n_head=2 --n_embd=32 --block_size=32 --batch_size=4 --compile=False"  # sizes on CPUs
ZEROS = ("zero2", "zero3", "zero1", "zero0")  # by importance
OFFLOADS = ("zero2_offload", "zero3_offload", "fsdp_offload")
MEASURED = ("H100", "H200")  # GPUs that must reach the targets; on others they are only reported
OF_PLAN = (0.9, 1.1)  # target for peak memory over the planner's estimate
FORMS = {"loss difference": ".1e", "tokens/s": ",.0f", "MFU": ".1%", "ratio": ".2f"}  # the numbers of a stage
FORMS |= {"ms/step": ",.1f", "peak GB": ".2f", "of plan": ".2f"}


@dataclass
class Stage:
    name: str
    group: str  # "alone": one at a time; all others run side by side on a GPU
    limit: float  # seconds until it is killed: about twice the estimate for an H100
    strategy: str  # "": arguments are the whole command, and {out} is its folder
    arguments: str
    like: str = ""  # the stage whose losses it must match
    within: float = 0.0
    after: str = ""  # the stage it needs; training resumes a copy of that run, from its last checkpoint but one
    prints: str = ""  # regular expression that its output must match
    status: int = 0  # expected exit status
    at_least: dict[str, float] = field(default_factory=dict)  # targets on MEASURED GPUs
    since, killed = 0.0, False  # start time; whether it was killed
    processes: list[Popen] = field(default_factory=list)
    result: dict[str, Any] = field(default_factory=lambda: {"status": "not run", "reason": ""})

    def command(self, folder: Path) -> list[str]:
        words = self.arguments.replace("{out}", str(folder)).split()
        if self.strategy:
            strategy = find_strategy(self.strategy)
            words = [strategy.script, *words, *strategy.arguments, f"--out_dir={folder}"]
        return words if words[0].startswith("./") else [sys.executable, *words]

    def ended(self, stop: bool) -> bool:
        """Whether it has ended. At its limit, or if `stop`, it is killed with all its processes."""
        alive = None in [process.poll() for process in self.processes]
        if "seconds" not in self.result and (stop or not alive or monotonic() > self.since + self.limit):
            self.killed, self.result["seconds"] = alive, round(monotonic() - self.since, 1)
            for process in self.processes:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        return "seconds" in self.result


def correctness(gpu: bool, data: Path, gpt2: str) -> list[Stage]:
    """Stages that compare losses, resume runs, and do what a user does first."""
    device, steps, save = ("cuda", 40, 30) if gpu else ("cpu", 8, 6)
    tiny = f"config/train_debug.py --dataset={data} --device={device} --max_iters={steps} --lr_decay_iters={steps}"
    tiny += f" --warmup_iters=5 --eval_interval={save} --eval_iters=2 --log_interval=1{'' if gpu else TINY}"
    fp32, bf16 = f"{tiny} --dtype=float32 --tf32=False", f"{tiny} --dtype=bfloat16"
    fp16, jit = f"{tiny} --dtype=float16", f"{bf16} --compile={gpu}"
    near, same, half = (1e-4, 1e-5, 0.05) if gpu else (1e-5, 0.0, 0.05)  # largest difference of a loss
    again, plain = f"{fp32} --init_from=resume", ("single", "fsdp")
    has_fp16 = (*plain, "zero0", "zero2", "zero3") if gpu else (*plain, "zero0")  # ZeRO refuses it on many CPUs
    where = f"--device={device} --out_dir={{out}}"
    quick = f"{'' if gpu else '1'} {where} --max_iters=150 --lr_decay_iters=150"
    quick += "" if gpu else f" --warmup_iters=5 --eval_iters=4{TINY}"
    batch, micro_steps = (1024, 1) if gpu else (2**31 - 1, 10**6)  # logits of 105 GB; more bytes than addresses
    huge = f"{gpt2} --benchmark --compile=False --batch_size={batch} --gradient_accumulation_steps={micro_steps}"
    return [
        Stage("cpu", "fp32", 90, "single", f"{fp32} --device=cpu"),
        *(Stage(name, "fp32", 240, name, fp32, "cpu", near) for name in OFFLOADS),  # early: the first compiles CPUAdam
        *(Stage(name, "fp32", 90, name, fp32, "cpu", near) for name in ("ddp", *plain, *ZEROS)),
        *(Stage(f"fp16_{name}", "half", 90, name, fp16, "cpu", half) for name in has_fp16),
        *(Stage(f"bf16_{name}", "half", 90, name, bf16, "cpu", half) for name in ("single", "zero0", "zero3")),
        *(Stage(f"compile_{name}", "compile", 150, name, jit, "cpu", half) for name in ("ddp", *plain, *ZEROS[:2])),
        *(Stage(f"gloo_{name}", "gloo", 120, name, fp32, "cpu", near) for name in ("ddp", "fsdp", *ZEROS[:3])),
        *(Stage(f"resume_{name}", "resume", 90, name, again, name, same, name) for name in (*plain, "zero2")),
        Stage("zero3_as_single", "resume", 90, "single", again, "cpu", near, "zero3"),
        Stage("single_as_zero2", "resume", 90, "zero2", again, "cpu", near, "single"),
        Stage("fsdp_as_zero3", "resume", 90, "zero3", again, "cpu", near, "fsdp"),
        Stage("async_save", "resume", 90, "single", f"{fp32} --async_save=True", "single", same),
        Stage("resume_async_save", "resume", 90, "single", again, "single", same, "async_save"),
        Stage("quickstart", "user", 120, "", f"./launch_quickstart.sh {quick}", prints="^The "),
        Stage("sample", "user", 60, "", f"sample.py {where}/../quickstart", "", 0, "quickstart", "^---"),
        Stage("memory", "alone", 60, "single", huge, prints="try, in this order", status=2),
    ]


def speed(gpu: bool, gpt2: str, beside: str) -> list[Stage]:
    """Stages that run alone on the device, the most important first, because time may run out."""
    bench = f"-m tools.benchmark --strategies=single --gpus=1 --speed --steps=25 --write={{out}} {beside}"
    bench += f" {gpt2} --gradient_accumulation_steps=4 --out_dir={{out}}/run"
    eager = f"{gpt2} --benchmark --steps=15 --gradient_accumulation_steps=4 --compile=False"
    large = f"{gpt2} --benchmark --steps=8 --gradient_accumulation_steps=2 --batch_size="
    medium = large.replace("gpt2.py", "gpt2_medium.py") + ("16" if gpu else "4")
    xl = large.replace("gpt2.py", "gpt2_xl.py") + ("8" if gpu else "4")
    best, ratio = {"MFU": 0.45, "ratio": 1.3}, {"ratio": 0.95}  # to nanoGPT; to the stage that it is like
    return [
        Stage("124m", "alone", 200, "", bench, at_least=best),
        Stage("xl_fsdp", "alone", 120, "fsdp", xl, at_least={"MFU": 0.5}),
        Stage("eager_124m", "alone", 45, "single", eager),
        *(Stage(f"{z}_124m", "alone", 50, z, eager, "eager_124m", 0.1, at_least=ratio) for z in ZEROS),
        Stage("medium", "alone", 90, "single", medium),
        Stage("xl_zero2", "alone", 110, "zero2", f"{xl} --compile=False", "xl_fsdp", 0.1),
    ]


class Acceptance:
    """Runs stages in the order of the table, within `minutes`. gpu: its name; "" on CPUs, one stage at a time."""

    def __init__(self, folder: Path, write: Path | None, gpu: str = "", minutes: float = 9.0):
        self.folder, self.write, self.gpu, self.minutes = folder, write, gpu, minutes
        self.side_by_side = max(2, (os.cpu_count() or 1) // 2) if gpu else 1
        self.since, self.stopped = monotonic(), False
        self.outputs = [sys.stdout, *([(write / "summary.txt").open("w")] if write else [])]
        self.results: dict[str, dict[str, Any]] = {}  # of the stages that have ended
        self.environment = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "2", **os.environ}
        self.environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # for launch scripts

    def say(self, *lines: str) -> None:
        """Print lines, and add them to summary.txt."""
        text = f"[{monotonic() - self.since:4.0f} s] " + "\n         ".join(lines)
        for output in self.outputs:
            print(text, file=output, flush=True)

    def run(self, stages: list[Stage]) -> bool:
        """Run all stages; returns whether none failed. Ctrl-C kills what is running and skips the rest."""
        waiting, running = list(stages), list[Stage]()
        while waiting or running:
            try:
                places = 1 if waiting and waiting[0].group == "alone" else self.side_by_side
                if waiting and len(running) < places and waiting[0].after in ("", *self.results):
                    running.append(stage := waiting.pop(0))
                    try:
                        self.start(stage)
                    except (OSError, ValueError) as error:  # such as a checkpoint that is missing
                        stage.result |= {"status": "FAILED", "reason": f"{type(error).__name__}: {error}"}
                for stage in running[:]:
                    if stage.ended(self.stopped) and stage.like in ("", *self.results):
                        running.remove(stage)
                        self.finish(stage)
                sleep(0.05)
            except KeyboardInterrupt:
                self.stopped = True
        return all(result["status"] in ("ok", "too large") for result in self.results.values())

    def start(self, stage: Stage) -> None:
        """Start the processes of a stage, unless there is a reason not to."""
        result, folder, stage.since = stage.result, self.folder / stage.name, monotonic()
        left, line = 60 * self.minutes + self.since - stage.since, stage.command(folder)
        result |= {"command": " ".join(line[1:]).replace(str(self.folder), "OUT"), "targets": stage.at_least}
        if self.stopped or left < stage.limit / 2:
            result["reason"] = "stopped" if self.stopped else f"too little time left of {self.minutes:g} minutes"
        elif stage.after and self.results[stage.after]["status"] != "ok":
            result["reason"] = f"needs {stage.after}, which did not pass"
        elif not self.fits(stage, line[2:]):
            result |= {"status": "too large", "reason": f"needs {result['planned GB']:.0f} GB"}
        else:
            stage.limit = min(stage.limit, left)
            self.say(f"{stage.name}: started, limit {stage.limit:.0f} s; {left:.0f} s left in total")
            folder.mkdir()
            if stage.after and stage.strategy:
                shutil.copytree(self.folder / stage.after, folder, dirs_exist_ok=True)
                shutil.rmtree(max((folder / "checkpoints").glob("step_*")))
            with folder.with_suffix(".log").open("w") as file:
                to: dict[str, Any] = {"stdin": DEVNULL, "stdout": file, "stderr": STDOUT, "start_new_session": True}
                lines = [line]
                if stage.group == "gloo":  # two nodes of one rank, both on the first GPU, which NCCL would refuse
                    nodes = "-m launch.ranks --nnodes=2 --master_addr=127.0.0.1 --master_port="
                    start = [sys.executable, *f"{nodes}{free_port(host='127.0.0.1')}".split()]
                    lines = [[*start, f"--node_rank={n}", "1", *line[1:], "--backend=gloo"] for n in (0, 1)]
                stage.processes = [Popen(words, cwd=ROOT, env=self.environment, **to) for words in lines]
            result["status"] = "ok"  # until a problem is found

    def fits(self, stage: Stage, arguments: list[str]) -> bool:
        """Whether the GPU has the memory that the planner predicts for a stage that runs alone."""
        if stage.group != "alone" or not stage.strategy or stage.status:
            return True
        device, dtype = ("H100", "bfloat16") if self.gpu else ("cpu", "float32")
        machine = Machines(1, 1, device, 1, 1, 1, 1, 1, dtype, fragmentation=0, baseline=0)  # its speed does not matter
        cfg, strategy = parse(RecipeConfig, arguments, ""), find_strategy(stage.strategy)
        model = cfg.model_config(open_dataset(Path(cfg.dataset)).vocab_size)
        batch = cfg.batch_size, cfg.gradient_accumulation_steps, cfg.activation_checkpointing
        planned = stage.result["planned GB"] = Candidate(model, strategy, machine, *batch).memory / 1e9
        return not self.gpu or planned < torch.cuda.get_device_properties(0).total_memory / 1e9

    def finish(self, stage: Stage) -> None:
        """Check a stage that has ended, and print its line; the result of a failed one has the end of its output."""
        result, log = stage.result, self.folder / f"{stage.name}.log"
        self.results[stage.name] = result
        text = log.read_text(errors="replace") if stage.processes else ""
        if stage.killed and self.stopped:
            result |= {"status": "not run", "reason": "stopped"}
        elif result["status"] == "ok":
            try:
                reason = next(self.problems(stage, text), "")
            except (OSError, ValueError, LookupError) as error:  # a file that it should have written
                reason = f"{type(error).__name__}: {error}"
            result |= {"status": "FAILED", "reason": reason} if reason else {}
        if result["status"] == "FAILED":
            result["log"] = text.splitlines()[-200:]
        words = [f"{stage.name}: {result['status']}, {result['seconds']} s", result["reason"]]
        words += [f"{name} {number}" for name, number in shown(result).items()]
        self.say(", ".join(filter(None, words)), *result.get("log", [])[-5:])

    def problems(self, stage: Stage, text: str) -> Iterator[str]:
        """Reasons why a stage failed; text: its output. Adds its numbers to its result."""
        if stage.killed:
            yield f"killed at its limit of {stage.limit:.0f} s"
        for code in (process.returncode for process in stage.processes if process.returncode != stage.status):
            yield f"status {code}: {explain(text.splitlines(), code).args[1]}"
        if not re.search(expected := stage.prints or ("resuming" if stage.after else ""), text, re.M):
            yield f"did not print {expected!r}"
        result, other = stage.result, self.results.get(stage.like, {})
        losses = self.measure(stage, result, other)
        if losses and not losses[-1] < losses[0]:
            yield f"val loss was {losses[0]:.4f} and became {losses[-1]:.4f}"
        if other and not result["loss difference"] <= stage.within:  # also if it is NaN
            yield f"losses differ from {stage.like} by more than {stage.within:g}"
        bounds = {key: (least, np.inf) for key, least in stage.at_least.items()} | {"of plan": OF_PLAN}
        for key, (low, high) in bounds.items() if find_device(self.gpu) in MEASURED else ():
            if result.get(key) is not None and not low <= result[key] <= high:
                yield f"{key} is not between {low:g} and {high:g}"

    def measure(self, stage: Stage, result: dict[str, Any], other: dict[str, Any]) -> list[float]:
        """Add the numbers of FORMS to a result; returns validation losses. other: the result to compare with."""
        folder, losses = self.folder / stage.name, list[float]()
        if (folder / "benchmark.json").exists():
            ours, *peer = json.loads((folder / "benchmark.json").read_text())["rows"]
            result |= {"tokens/s": ours["tokens_per_second"], "MFU": ours["mfu"], "ms/step": ours["step_ms"]}
            other = {"tokens/s": peer[0]["tokens_per_second"]} if peer else {}
        elif (folder / "metrics.jsonl").exists():
            rows, losses = read_losses(folder)
            speed = summarize(list(rows.values()))
            result |= {"ms/step": speed["step_ms"], "peak GB": speed["peak_memory_bytes"] / 1e9}
            if stage.group == "alone":
                result |= {"tokens/s": speed["tokens_per_second"], "MFU": speed["mfu"]}
            if self.gpu and "planned GB" in result:  # on CPUs the peak is that of the process
                result["of plan"] = result["peak GB"] / result["planned GB"]
            if stage.like:
                theirs, _ = read_losses(self.folder / stage.like)
                differences = [abs(rows[step]["loss"] - row["loss"]) for step, row in theirs.items()]
                result["loss difference"] = float(np.max(differences))
        if "tokens/s" in result and "tokens/s" in other:
            result["ratio"] = result["tokens/s"] / other["tokens/s"]
        return losses


def shown(result: dict[str, Any]) -> dict[str, str]:
    """The numbers of a result as text, by title."""
    return {key: f"{result[key]:{form}}" for key, form in FORMS.items() if result.get(key) is not None}


def read_losses(folder: Path) -> tuple[dict[int, dict[str, Any]], list[float]]:
    """Training rows by step, and validation losses."""
    rows, _ = read_run(folder)
    return {r["step"]: r for r in rows if r["kind"] == "train"}, [r["val_loss"] for r in rows if r["kind"] == "eval"]


def write_data(folder: Path, tokenizer: Tokenizer, tokens: int) -> None:
    """Write token ids with something to learn: about half of them follow from the id before."""
    random, size = np.random.default_rng(0), tokenizer.vocab_size
    with Writer(folder, tokenizer, "tools.accept") as writer:
        for split, count in (("train", tokens), ("val", tokens // 8)):
            new = np.minimum(random.zipf(1.2, count), size) - 1
            writer.write(split, np.where(random.random(count) < 0.5, new, (31 * np.roll(new, 1) + 7) % size), end=False)


def page(about: dict[str, Any], results: dict[str, dict[str, Any]]) -> str:
    """README.md: the machine, and a row for each stage."""
    columns = [key for key in FORMS if any(key in shown(result) for result in results.values())]
    lines = [f"# Acceptance on {about['device']}", "", *(f"- {key}: {value}" for key, value in about.items()), ""]
    lines += [f"| stage | result | s | {' | '.join(columns)} | reason |", f"{'|---' * (4 + len(columns))}|"]
    for name, result in results.items():
        numbers = [shown(result).get(key, "") for key in columns]
        cells = [name, result["status"], str(result["seconds"]), *numbers, result["reason"].replace("|", "/")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def choose(stages: list[Stage], prefixes: list[str]) -> list[Stage]:
    """The stages whose name or group has one of the prefixes, and those that they need."""
    chosen = set[str]()
    for prefix in prefixes:
        found = {stage.name for stage in stages if stage.name.startswith(prefix) or stage.group.startswith(prefix)}
        if not found:
            groups = ", ".join(dict.fromkeys(stage.group for stage in stages))
            raise UserError(f"--only={prefix}: no stage or group has this prefix; the groups are {groups}")
        chosen |= found
    for stage in reversed(stages):
        chosen |= {stage.like, stage.after} if stage.name in chosen else set()
    return [stage for stage in stages if stage.name in chosen]


def main(usage: str) -> None:
    parser = make_parser("accept", usage)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: tiny sizes, no targets")
    parser.add_argument("--peer", type=Path, help="a checkout of nanoGPT, whose train.py is timed as well")
    parser.add_argument("--write", type=Path, help="folder for the results; default: results/gpu_NAME, on CPUs none")
    parser.add_argument("--only", default="", help="run only these: comma-separated prefixes of stages or groups")
    parser.add_argument("--minutes", type=float, default=9.0, help="time limit of the whole run")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device=cuda: no GPU is visible; --device=cpu runs the same stages at tiny size")
    gpu = torch.cuda.get_device_name() if args.device == "cuda" else ""
    write = args.write or (ROOT / "results" / f"gpu_{re.sub('[^a-z0-9]+', '_', gpu.lower())}" if gpu else None)
    if write:
        write.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    about = environment(replace(distributed.SINGLE_PROCESS, device=torch.device(args.device)))
    with tempfile.TemporaryDirectory(prefix="accept-") as folder:
        acceptance, data = Acceptance(Path(folder), write, gpu, args.minutes), Path(folder, "data")
        write_data(data, tokenizer_from({"name": "gpt2" if gpu else "byte"}), 8_000_000 if gpu else 50_000)
        gpt2 = f"config/train_gpt2.py --dataset={data}{'' if gpu else TINY + ' --device=cpu'}"
        if args.peer:
            acceptance.environment["NANOGPT"] = str(args.peer.resolve())
        beside = "--beside=tests.nanogpt" if args.peer else ""
        stages = [*correctness(bool(gpu), data, gpt2), *speed(bool(gpu), gpt2, beside)]
        passed = acceptance.run(choose(stages, args.only.split(",")))
    counts = Counter(result["status"] for result in acceptance.results.values())
    acceptance.say(", ".join(f"{number} {status}" for status, number in counts.items()))
    if write:
        found = json.dumps({"machine": about, "stages": acceptance.results}, indent=1)
        (write / "accept.json").write_text(found + "\n")
        (write / "README.md").write_text(page(about, acceptance.results))
    sys.exit(not passed)
