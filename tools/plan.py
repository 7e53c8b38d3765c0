"""What fits, and how fast: a model under every strategy, predicted before you rent the GPUs.

    python -m tools.plan --model=gpt2-xl --gpus=8 --gpu-memory=80
    python -m tools.plan config/train_gpt2.py --gpus=8 --nodes=4 --device=H100 --link=3200 --all
    python -m tools.plan --model=gpt2-xl --curve=curve.png
    python -m tools.plan config/train_gpt2.py --gpus=2 --measured=benchmark.json --gpu-memory=8

Other --key=value change the recipe, as for the train scripts. Prints the best micro-batch of each strategy, a
recommendation, and the lines to paste; exit status 2 if nothing fits.
"""

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from data.errors import did_you_mean
from model import GPTConfig
from tools.plan_formulas import ALIKE, HOST_BANDWIDTH, Candidate, Request, System, best_of_each, recommend
from tools.terminal import align, underscored
from training import distributed
from training.config import ROOT, PlainTrainConfig, Problem, Settings, key, parse
from training.deepspeed_config import DeepSpeedTrainConfig
from training.devices import gigabytes
from training.errors import ConfigError, UserError
from training.figures import label_ends, line_style, new_figure, style_axes
from training.gpus import DEVICES, find_device
from training.strategies import find_strategy, strategies

# name -> block_size, vocab_size, n_layer, n_head, n_embd (Radford et al., 2019, table 2; arXiv:2005.14165, table 2.1)
GPT2_VOCABULARY = 50257
MODELS = {
    "gpt2": (1024, 50257, 12, 12, 768),
    "gpt2-medium": (1024, 50257, 24, 16, 1024),
    "gpt2-large": (1024, 50257, 36, 20, 1280),
    "gpt2-xl": (1024, 50257, 48, 25, 1600),
    "gpt3-6.7b": (2048, 50257, 32, 32, 4096),
    "gpt3-175b": (2048, 50257, 96, 96, 12288),
}
STEP_TOKENS = 2**19  # half a million, as GPT-3's smaller models (arXiv:2005.14165, table 2.1)
TOKENS_PER_PARAMETER = 20  # Hoffmann et al., arXiv:2203.15556
CHOICES = {"model": ("", *MODELS), "activation_checkpointing": ("", "True", "False")}
CHOICES["dtype"] = ("", "bfloat16", "float16", "float32")
RANGES = {"gpus": (1, 10**5), "nodes": (1, 10**5), "achievable": (0.01, 1), "link_share": (0.01, 1), "overlap": (0, 1)}
RANGES |= {"fragmentation": (0, 1), "link": (0.001, 10**6)}
ON_CPU = {"device": "cpu", "overlap": 0.5, "fragmentation": 0.0, "link_share": 1.0}  # results/zero_links
MOST_RANKS, CONFIG = 1024, "config/planned.py"
MARKED = ("gpus", "device", "link", "global_batch")  # keys whose defaults are pointed out
CURVE = ("single", "ddp", "zero1", "zero2", "zero3", "zero3_offload")  # if --strategies does not name others
FOOTER = """\
GB per rank: model state (parameters, gradients, optimizer states), activations, buffers (gathered parameters, gradients
in flight), other (process, fragments); sent per step. host, NVMe: GB per node. MFU: of the matmul peak.
batch: sequences x micro-steps of a rank, * with activation checkpointing."""


@dataclass(frozen=True)
class PlanConfig(Settings):
    """The keys of the planner. Empty text and 0 mean: not given."""

    model: str = key("", ", ".join(MODELS), "Model (or a recipe, config/x.py)")
    gpus: int = key(8, "GPUs, or CPU ranks, per node; also --ranks", "Machines")
    nodes: int = key(1, "number of nodes")
    device: str = key("A100", ", ".join(DEVICES))
    gpu_memory: float = key(0.0, "GB, instead of the device's; of a CPU rank, its part of the host's")
    tflops: float = key(0.0, "peak of dense matmuls in dtype, instead of the device's")
    link: float = key(400.0, "Gbit/s of a node to the others, all of its ports together")
    node_link: float = key(0.0, "Gbit/s between the ranks of a node, instead of the device's")
    measured: str = key("", "benchmark.json: matmul peak, link and process memory as tools.benchmark measured them")
    dtype: str = key("", "bfloat16, float16, float32; empty: the recipe's, else the measured, else bfloat16", "Step")
    global_batch: int = key(0, f"sequences per step; 0: the recipe's, or about {STEP_TOKENS:,} tokens")
    batch_size: int = key(0, "sequences per rank and micro-step; 0: the best")
    activation_checkpointing: str = key("", "True, False; empty: whichever is better")
    strategies: str = key("", f"{','.join(strategies())}; empty: all")
    achievable: float = key(0.5, "share of the peak that computing reaches; nanoGPT's GPT-2 0.3 (A100)", "Assumptions")
    link_share: float = key(0.8, "share of a link's rate that collectives reach; 1 on CPU ranks")
    overlap: float = key(0.8, "share of computing that hides communication; 0.5 on CPU ranks (results/zero_links)")
    fragmentation: float = key(0.1, "share of activations and buffers that the allocator loses; 0 on CPU ranks")
    baseline: float = key(1.5, "GB of a process besides tensors: CUDA, NCCL")
    all: bool = key(False, "print every micro-batch, with and without activation checkpointing", "Output")
    curve: str = key("", "table: from 1 to 1,024 GPUs, of five strategies or those named; FILE.png: drawn as well")

    def problems(self) -> Iterator[Problem]:
        """Key and rule of each value that cannot be."""
        for name, value in vars(self).items():
            low, high = RANGES.get(name, (0, math.inf))
            if isinstance(value, int | float) and not low <= value <= high:
                yield name, f"must be from {low:,} to {high:,}" if high < math.inf else "must not be negative"
            if value not in CHOICES.get(name, (value,)):
                yield name, f"must be one of {', '.join(CHOICES[name][1:])}{did_you_mean(value, CHOICES[name])}"
        if self.curve not in ("", "table") and not (self.curve.endswith(".png") and Path(self.curve).parent.is_dir()):
            yield "curve", "must be table, or a .png file in a folder that exists"


@dataclass(frozen=True)
class RecipeConfig(DeepSpeedTrainConfig, PlainTrainConfig):
    """Every key that a recipe of either train script may set."""


def read_benchmark(path: str, dtype: str) -> list[str]:
    """Keys and values that benchmark.json measured in its first timed row, as arguments; dtype: empty for its own."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        row = next(row for row in found["rows"] if row.get("ceiling_flops"))
        machine, parts = found.get("machine") or {}, row["breakdown_ms"]
        computing = parts["computation"] if "computation" in parts else parts["forward"] + parts["backward"]
        flops = machine.get("matmul_flops") or {found["dtype"]: row["ceiling_flops"] / row["ranks"]}
        values = {"device": found["environment"]["device"], "dtype": dtype or found["dtype"]}
        values["achievable"] = min(1.0, row["ceiling_share"] * row["step_ms"] / computing)
        if row["peak_device_bytes"] is None:  # of a GPU's memory, the process' share was not measured
            process_bytes = machine.get("process_bytes") or row["memory"]["interpreter"]
            values |= {**ON_CPU, "baseline": process_bytes / 1e9}
        if link := machine.get("link_bytes_per_second"):
            values |= {"node_link": 8e-9 * link, "link_share": 1.0}
    except (OSError, ValueError, KeyError, TypeError, StopIteration):
        rule = "must be a benchmark.json with timed rows, as tools.benchmark --write=FOLDER writes it"
        raise ConfigError(f"measured = {path!r}: {rule}; measure again") from None
    if values["dtype"] not in flops:
        raise ConfigError(f"dtype = {dtype!r}: {path} has {', '.join(flops)}; use or measure it")
    values["tflops"] = flops[values["dtype"]] / 1e12
    return [f"--{name}={value}" for name, value in values.items()]


def build_system(cfg: PlanConfig, dtype: torch.dtype) -> System:
    """The data sheet of the device, replaced by the keys that are given."""
    values: dict[str, Any] = {name: getattr(cfg, name) for name in RANGES}
    values |= {"link": 1e9 / 8 * cfg.link, "baseline": 1e9 * cfg.baseline}
    name = find_device(cfg.device)
    if name:
        device = DEVICES[name]
        if dtype == torch.bfloat16 and not device.has_bf16:
            raise ConfigError(f"dtype = 'bfloat16': {name} lacks it; use --dtype=float16 or float32")
        values |= {"memory": 1e9 * device.memory, "memory_bandwidth": 1e9 * device.bandwidth}
        values |= {"flops": device.peak(dtype, tf32=True), "node_link": 1e9 * device.link}
    elif cfg.device != "cpu":
        hint = f"{did_you_mean(cfg.device, DEVICES)}; name a similar one and your --tflops"
        raise ConfigError(f"device = {cfg.device!r}: unknown{hint}")
    elif not cfg.tflops or not cfg.gpu_memory:
        raise ConfigError("device = 'cpu': needs --measured=benchmark.json and the memory of a rank, --gpu_memory=8")
    else:
        values |= {"memory_bandwidth": HOST_BANDWIDTH / cfg.gpus, "node_link": values["link"]}
    given = {"memory": 1e9 * cfg.gpu_memory, "flops": 1e12 * cfg.tflops, "node_link": 1e9 / 8 * cfg.node_link}
    values |= {key: value for key, value in given.items() if value}
    return System(device=name or "CPU", on_gpu=bool(name), dtype=dtype, **values)


def is_option(argument: str) -> bool:
    """Whether an argument is the planner's, and not a recipe or a setting of the train scripts."""
    name = argument.lstrip("-").partition("=")[0]
    return argument.startswith("-") and (hasattr(PlanConfig, name) or not did_you_mean(name, vars(RecipeConfig())))


def build_request(argv: list[str]) -> tuple[PlanConfig, Request]:
    """Raises ConfigError where the parts of the command line do not fit together."""
    argv = [argument.replace("--ranks=", "--gpus=") for argument in underscored(argv)]
    options = [argument for argument in argv if is_option(argument)]
    recipes = [argument for argument in argv if not is_option(argument)]
    cfg = parse(PlanConfig, options, __doc__ or "")
    if bool(cfg.model) == bool(recipes):
        raise ConfigError("give a model, --model=gpt2-xl, or a recipe, config/x.py --key=value, and not both")
    recipe = parse(RecipeConfig, recipes, "")
    meta = ROOT / "data" / recipe.dataset / "meta.json"
    vocab_size = json.loads(meta.read_text())["vocab_size"] if meta.is_file() else GPT2_VOCABULARY
    model = GPTConfig(*MODELS[cfg.model]) if cfg.model else recipe.model_config(vocab_size)
    dtype = cfg.dtype or recipe.dtype.replace("auto", "")
    if cfg.measured:  # the options, given after it, replace what was measured
        cfg = parse(PlanConfig, [*read_benchmark(cfg.measured, dtype), *options], "")
    system = build_system(cfg, getattr(torch, cfg.dtype or dtype or "bfloat16"))
    per_rank = max(1.0, STEP_TOKENS / model.block_size / system.ranks)
    batch = recipe.batch_size * recipe.gradient_accumulation_steps if recipes else 0
    batch = cfg.global_batch or batch or system.ranks * 2 ** round(math.log2(per_rank))
    tokens = recipe.max_iters * batch * model.block_size if recipes else TOKENS_PER_PARAMETER * model.parameter_count()
    checkpointing = {"": (False, True), "True": (True,), "False": (False,)}[cfg.activation_checkpointing]
    chosen = tuple(find_strategy(name) for name in cfg.strategies.split(",") if name)
    name = cfg.model or " ".join(recipes)
    return cfg, Request(name, model, system, chosen, batch, tokens, cfg.batch_size, checkpointing, recipes)


def header(cfg: PlanConfig, request: Request) -> str:
    """What is planned, in three lines; defaults that matter are marked."""
    system, model, tokens = request.system, request.model, request.global_batch * request.model.block_size
    gpus, device, link, batch = (" (default)" if getattr(cfg, k) == getattr(PlanConfig, k) else "" for k in MARKED)
    batch = "" if request.recipes else batch  # a recipe sets it
    where = f"{system.gpus} {'GPUs' if system.on_gpu else 'CPU ranks'}{gpus}, {system.device}{device}"
    where += f", {gigabytes(system.memory)} each, {str(system.dtype).removeprefix('torch.')}"
    if system.nodes > 1:
        where = f"{system.nodes} nodes of {where}, {8e-9 * system.link:,.4g} Gbit/s between them{link}"
    step = f"{request.global_batch:,} sequences of {model.block_size:,} = {tokens:,} tokens{batch}"
    name = f"{request.name}: {model.parameter_count():,} parameters"
    return f"{name}\n{where}\na step: {step}; the run: {request.tokens:.3g} tokens"


def cell(value: float) -> str:
    """Three digits; empty for 0."""
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}" if value else ""


def table(request: Request, candidates: list[Candidate]) -> str:
    """A line per candidate."""
    rows = [["strategy", "batch", "state", "activ.", "buffers", "other", "total", "free", "host", "NVMe", "sent"]]
    rows[0] += ["step, s", "tokens/s", "MFU", "days"]
    for c in candidates:
        memory, days = c.memory, request.tokens / c.tokens_per_second() / 86400
        sizes = [memory.model_state, memory.activations, memory.buffers, memory.other, memory.total(), c.spare()]
        sizes += [memory.host, memory.nvme, c.time.sent]
        batch = f"{c.batch} x {c.micro_steps}{' *' * c.checkpointing}"
        speed = [cell(c.time.total()), f"{c.tokens_per_second():,.0f}", f"{c.mfu():.0%}", cell(days)]
        rows.append([c.strategy.name, batch, *(cell(size / 1e9) for size in sizes), *speed])
    return align(rows, ("strategy", "batch"))


def config_lines(request: Request, taken: Candidate) -> list[str]:
    """A config file to paste: a whole model, or only what the plan adds to the user's recipe."""
    step = request.global_batch * request.model.block_size
    names = ("n_layer", "n_head", "n_embd", "bias") if not request.recipes else ()
    return [
        f"batch_size = {taken.batch}",
        f"gradient_accumulation_steps = {taken.micro_steps * taken.system.ranks}  # all ranks together",
        f"activation_checkpointing = {taken.checkpointing}",
        f"dtype = '{str(taken.system.dtype).removeprefix('torch.')}'",
        f"block_size = {request.model.block_size}",
        f"max_iters = {math.ceil(request.tokens / step)}  # {step:,} tokens each",
        *(f"{name} = {getattr(request.model, name)}" for name in names),
    ]


def command(request: Request, taken: Candidate) -> str:
    """The line that launches it; launchers named after a strategy select it by themselves."""
    strategy, system = taken.strategy, taken.system
    selecting = () if strategy.launcher == f"./launch_deepspeed_{strategy.name}.sh" else strategy.arguments
    arguments = [argument.format(half=system.gpus) for argument in selecting if argument != "--strategy=fsdp"]
    arguments += ["--nvme_path=/local_nvme"] if strategy.optimizer_device == "nvme" else []
    arguments += [] if system.on_gpu else ["--device=cpu"]
    hosts = ["HOSTFILE=hostfile"] if system.nodes > 1 else []
    ranks = [str(system.gpus)] if system.nodes == 1 and strategy.name != "single" else []
    return " ".join([*hosts, strategy.launcher, *ranks, *request.recipes, CONFIG, *arguments])


def print_report(cfg: PlanConfig, request: Request) -> None:
    """Print every candidate, or the best of each strategy, and what to do; UserError if none fits."""
    if not (candidates := request.candidates()):
        raise UserError(f"strategies: not possible with {request.system.ranks} ranks on {request.system.nodes} nodes")
    bests = best_of_each(candidates)
    print(header(cfg, request), table(request, candidates if cfg.all else bests), FOOTER, sep="\n\n")
    if not (taken := recommend(bests)):
        nearest = max(candidates, key=Candidate.spare)
        lacking = f"{nearest.strategy.name} comes nearest and lacks {gigabytes(-nearest.spare())} per rank"
        raise UserError(f"nothing fits: {lacking}; take more or larger GPUs, or shorter sequences")
    print(f"\nTake {taken.strategy.name}, the simplest within {ALIKE:.0%} of the fastest that fits.")
    print(f"\n# {CONFIG}", *config_lines(request, taken), "", command(request, taken), sep="\n")


def print_curve(cfg: PlanConfig, request: Request) -> None:
    """Print tokens/s per GPU from 1 to MOST_RANKS GPUs, "-" where nothing fits; if --curve is a PNG, draw it."""
    request = replace(request, strategies=request.strategies or tuple(map(find_strategy, CURVE)))
    sizes, rates = dict[str, dict[int, float]](), dict[str, dict[int, float]]()  # strategy -> GPUs -> GB; tokens/s
    counts = [2**power for power in range(MOST_RANKS.bit_length())]
    for ranks in counts:
        found = request.at(ranks).candidates()
        for best in best_of_each(found):
            name = best.strategy.name.replace("single", "ddp")  # on one GPU, DDP is one process
            least = min(c.memory.total() for c in found if c.strategy == best.strategy)
            sizes.setdefault(name, {})[ranks] = least / 1e9
            rates.setdefault(name, {}).update({ranks: best.tokens_per_second() / ranks} if best.spare() >= 0 else {})
    rows = [
        [f"{ranks:,}", *(f"{row[ranks]:,.0f}" if ranks in row else "-" for row in rates.values())] for ranks in counts
    ]
    request = request.at(MOST_RANKS)
    title = header(cfg, request)
    print(title, "tokens/s per GPU", align([["GPUs", *rates], *rows], ()), sep="\n\n")
    if cfg.curve.endswith(".png"):
        draw(title, request.system, rates, sizes).savefig(cfg.curve)
        print(f"\n{cfg.curve}")


def draw(title: str, system: System, rates: dict[str, dict[int, float]], sizes: dict[str, dict[int, float]]) -> Any:
    """A matplotlib figure: both tables of print_curve over the number of GPUs."""
    figure, limit = new_figure(8, 6.5), system.memory / 1e9
    speed, memory = figure.subplots(2, 1, sharex=True)
    for axes, lines in ((speed, rates), (memory, sizes)):
        for number, (name, line) in enumerate(lines.items()):
            axes.plot(list(line), list(line.values()), marker=".", label=name if line else None, **line_style(number))
    memory.loglog([1, MOST_RANKS], [limit, limit], "0.4", base=2, label=f"one {system.device}")
    speed.set_ylim(0)
    memory.set_xlabel("GPUs")
    for axes, caption in ((speed, "tokens/s per GPU, where it fits"), (memory, "GB per GPU, smallest micro-batch")):
        axes.xaxis.set_major_formatter("{x:,g}")
        axes.yaxis.set_major_formatter("{x:,g}")
        axes.set_title(caption, fontsize=10, loc="left")
        style_axes(axes)
        label_ends(axes)
    figure.suptitle("; ".join(title.replace(" (default)", "").splitlines()[:2]), fontsize=9)
    return figure


def main() -> None:
    cfg, request = build_request(sys.argv[1:])
    (print_curve if cfg.curve else print_report)(cfg, request)


if __name__ == "__main__":
    distributed.run(main)
