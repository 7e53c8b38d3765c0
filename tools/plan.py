"""What fits, and how fast: a model under every strategy, predicted before you rent the GPUs.

    python -m tools.plan --model=gpt2-xl --gpus=8 --gpu-memory=80
    python -m tools.plan config/train_gpt2.py --gpus=8 --nodes=4 --device=H100 --link=3200 --all
    python -m tools.plan config/train_gpt2.py --gpus=2 --measured=benchmark.json --gpu-memory=8

Other --key=value change the recipe, as for the train scripts; those of a layout, such as --tensor_parallel=8, a model,
too. Prints the best of each strategy, a recommendation, and the lines to paste; exit status 2 if nothing fits.
"""

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product, starmap
from pathlib import Path
from typing import Any

import torch

from data.errors import did_you_mean
from model import GPTConfig
from tools.plan_formulas import ALIKE, HOST_BANDWIDTH, Candidate, Machines, best_of_each, simplest
from tools.terminal import align, underscored
from training import parallel
from training.config import ROOT, PlainTrainConfig, Problem, key, parse
from training.deepspeed_config import DeepSpeedTrainConfig, strategy_of
from training.deepspeed_parallel import check
from training.distributed import SINGLE_PROCESS, Layout, run
from training.errors import ConfigError, UserError
from training.figures import label_ends, line_style, new_figure, style_axes
from training.gpus import DEVICES, Device, find_device
from training.strategies import Strategy, find_strategy, gigabytes, strategies

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
CHOICES = {"model": ("", *MODELS), "dtype": ("", "bfloat16", "float16", "float32")}
RANGES = {"gpus": (1, 10**5), "nodes": (1, 10**5), "achievable": (0.01, 1), "link_share": (0.01, 1), "overlap": (0, 1)}
RANGES |= {"fragmentation": (0, 1), "link": (0.001, 10**6)}
ON_CPU = {"device": "cpu", "overlap": 0.5, "fragmentation": 0.0, "link_share": 1.0}  # results/zero_links
MOST_RANKS, CONFIG = 1024, "config/planned.py"
LAYOUT = ("--tensor_", "--sequence_", "--pipeline_", "--expert_parallel")  # how its keys begin
CURVE = "single,ddp,zero1,zero2,zero3,zero3_offload"  # if --strategies does not name others
FOOTER = """\
GB per rank: model state (parameters, gradients, optimizer states), activations, buffers (gathered parameters, gradients
in flight), other (process, fragments); sent per step. host, NVMe: GB per node. MFU: of the matmul peak.
batch: sequences x micro-steps of a rank, * with activation checkpointing."""


@dataclass(frozen=True)
class PlanConfig(Machines):
    """The keys of the planner. Empty text and 0 mean: not given."""

    model: str = key("", ", ".join(MODELS), "Model (or a recipe, config/x.py)")
    vocab_size: int = key(0, f"of a recipe whose data is not prepared; 0: GPT-2's, {GPT2_VOCABULARY:,}")
    measured: str = key("", "benchmark.json: matmul peak, link and process memory as tools.benchmark measured them")
    global_batch: int = key(0, f"sequences per step; 0: the recipe's, or about {STEP_TOKENS:,} tokens", "Step")
    strategies: str = key("", f"{','.join(strategies())}; empty: all")
    layouts: bool = key(False, "also try layouts; the default if nothing fits without offload", "Layout")
    all: bool = key(False, "print every micro-batch, with and without activation checkpointing", "Output")
    curve: str = key("", "table: from 1 to 1,024 GPUs, of five strategies or those named; FILE.png: drawn as well")

    def problems(self) -> Iterator[Problem]:
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

    def rank_problems(self) -> Iterator[Problem]:
        """None: the ranks of this process are not those of the run."""
        yield from ()


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
        raise ConfigError(f"measured = {path!r}: {rule}") from None
    if values["dtype"] not in flops:
        raise ConfigError(f"dtype = {dtype!r}: {path} has {', '.join(flops)}; use or measure it")
    values["tflops"] = flops[values["dtype"]] / 1e12
    return [f"--{name}={value}" for name, value in values.items()]


def fill_in(cfg: PlanConfig) -> PlanConfig:
    """The data sheet's numbers of the device, where no others are given."""
    name = find_device(cfg.device)
    if not name and cfg.device != "cpu":
        hint = f"{did_you_mean(cfg.device, DEVICES)}; name a similar one and your --tflops"
        raise ConfigError(f"device = {cfg.device!r}: unknown{hint}")
    if not name and not (cfg.tflops and cfg.gpu_memory):
        raise ConfigError("device = 'cpu': needs --measured=benchmark.json and the memory of a rank, --gpu_memory=8")
    device = DEVICES[name] if name else Device(0, 0, 0, 0, HOST_BANDWIDTH / 1e9 / cfg.gpus, cfg.link / 8)
    if cfg.dtype == "bfloat16" and not device.has_bf16:
        raise ConfigError(f"dtype = 'bfloat16': {name} lacks it; use --dtype=float16 or float32")
    sheet: dict[str, Any] = {"gpu_memory": device.memory, "memory_bandwidth": device.bandwidth}
    sheet |= {"node_link": 8 * device.link, "tflops": device.peak(getattr(torch, cfg.dtype), tf32=True) / 1e12}
    return replace(cfg, device=name or "cpu", **{key: getattr(cfg, key) or value for key, value in sheet.items()})


@dataclass(frozen=True)
class Request:
    """What to plan: a model, the machines, a step and a run."""

    cfg: PlanConfig
    model: GPTConfig
    recipe: RecipeConfig  # with the model's shape
    recipes: list[str]  # and settings
    global_batch: int  # sequences per step
    tokens: float  # of the run

    def problems(self, strategy: Strategy, layout: Layout) -> list[str]:
        """Why such a run would be refused, with what config_lines sets for a pipeline."""
        cfg, size = replace(self.recipe, compile=False, eval_iters=0), self.cfg.ranks
        broken = parallel.problems(cfg, layout, size, self.cfg.gpus)
        if problems := [f"{name} = {getattr(cfg, name)}: {rule}" for name, rule in broken]:
            return problems
        if self.global_batch % (data := layout.data(size)):
            kind, near = "ranks" if data == size else "data-parallel ranks", max(1, self.global_batch // data) * data
            return [f"global_batch = {self.global_batch}: must be divisible by the {data} {kind}; set {near}"]
        ranks = replace(SINGLE_PROCESS, world_size=size, layout=layout)
        return list(check(cfg, ranks, self.model, strategy_of({"zero_optimization": strategy.zero})))

    def candidates(self, search: bool = False) -> list[Candidate]:
        """Every strategy and micro-batch, also what does not fit; search: in every layout of powers of two."""
        cfg, refused, possible = self.cfg, list[str](), list[Candidate]()
        chosen = [find_strategy(name) for name in cfg.strategies.split(",") if name] or strategies().values()
        impossible = "ddp" if cfg.ranks == 1 else "single"
        several = cfg.nodes > 1 and cfg.gpus > 1  # nodes of several GPUs, which HSDP needs
        chosen = [one for one in chosen if one.name != impossible and (several or not one.hybrid)]
        layouts = [self.recipe.layout()]
        if search:
            powers = [2**power for power in range(cfg.ranks.bit_length())]
            layouts = list(starmap(Layout, product(powers, powers, powers, powers if self.model.n_expert else [1])))
        for strategy, layout in product(chosen, layouts):
            problems = self.problems(strategy, layout)
            refused += problems
            sequences = 0 if problems else self.global_batch // layout.data(cfg.ranks)
            possible += [
                Candidate(self.model, strategy, cfg, batch, sequences // batch, checkpointing, layout)
                for batch in range(1, sequences + 1)
                if sequences % batch == 0
                for checkpointing in (False, True)
            ]
        if refused and not possible:
            raise ConfigError(refused[0])
        return possible

    def at(self, ranks: int) -> "Request":
        """The same on so many ranks, nodes filled first; the global batch is rounded up to a multiple of them."""
        gpus = math.gcd(ranks, self.cfg.gpus)
        cfg = replace(self.cfg, gpus=gpus, nodes=ranks // gpus)
        return replace(self, cfg=cfg, global_batch=math.ceil(self.global_batch / ranks) * ranks)


def build_request(argv: list[str]) -> Request:
    """Raises ConfigError where the parts of the command line do not fit together."""
    options, recipes = list[str](), list[str]()  # the planner's own; recipes and settings of the train scripts
    for argument in underscored(argv):
        argument = argument.replace("--ranks=", "--gpus=")
        name, is_path = argument.lstrip("-").partition("=")[0], not argument.startswith("-")
        of_recipe = is_path or (not hasattr(PlanConfig, name) and did_you_mean(name, vars(RecipeConfig())))
        (recipes if of_recipe else options).append(argument)
    cfg = parse(PlanConfig, options, __doc__ or "")
    if bool(cfg.model) == any(not argument.startswith(LAYOUT) for argument in recipes):  # a model may have one
        raise ConfigError("give a model, --model=gpt2-xl, or a recipe, config/x.py --key=value, and not both")
    recipe = parse(RecipeConfig, recipes, "")
    meta = ROOT / "data" / recipe.dataset / "meta.json"
    known = json.loads(meta.read_text())["vocab_size"] if meta.is_file() else GPT2_VOCABULARY
    model = GPTConfig(*MODELS[cfg.model]) if cfg.model else recipe.model_config(cfg.vocab_size or known)
    dtype = cfg.dtype or recipe.dtype.replace("auto", "")
    if cfg.measured:  # the options, given after it, replace what was measured
        cfg = parse(PlanConfig, [*read_benchmark(cfg.measured, dtype), *options], "")
    cfg = fill_in(replace(cfg, dtype=cfg.dtype or dtype or "bfloat16"))
    batch = recipe.batch_size * recipe.gradient_accumulation_steps
    tokens = recipe.max_iters * (cfg.global_batch or batch) * model.block_size
    if cfg.model:
        batch = cfg.ranks * 2 ** round(math.log2(max(1.0, STEP_TOKENS / model.block_size / cfg.ranks)))
        tokens = TOKENS_PER_PARAMETER * model.parameter_count()
    recipe = replace(recipe, **{name: value for name, value in vars(model).items() if hasattr(recipe, name)})
    return Request(cfg, model, recipe, recipes, cfg.global_batch or batch, tokens)


def header(request: Request) -> str:
    """What is planned, in three lines."""
    cfg, model, tokens = request.cfg, request.model, request.global_batch * request.model.block_size
    where = f"{cfg.gpus} {'GPUs' if cfg.on_gpu else 'CPU ranks'}, {cfg.device}"
    where += f", {gigabytes(1e9 * cfg.gpu_memory)} each, {cfg.dtype}"
    if cfg.nodes > 1:
        where = f"{cfg.nodes} nodes of {where}, {cfg.link:,.4g} Gbit/s between them"
    step = f"{request.global_batch:,} sequences of {model.block_size:,} = {tokens:,} tokens"
    name = f"{cfg.model or ' '.join(request.recipes)}: {model.parameter_count():,} parameters"
    return f"{name}\n{where}\na step: {step}; the run: {request.tokens:.3g} tokens"


def cell(value: float) -> str:
    """Three digits; empty for 0."""
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}" if value else ""


def table(request: Request, candidates: list[Candidate]) -> str:
    rows = []
    for c in candidates:
        sizes = {"state": c.model_state, "activ.": c.activations, "buffers": c.buffers, "other": c.other}
        sizes |= {"total": c.memory, "free": c.spare, "host": c.host, "NVMe": c.nvme, "sent": c.sent}
        row = {"strategy": c.strategy.name, "layout": c.sizes}
        row |= {"batch": f"{c.batch} x {c.micro_steps}{' *' * c.checkpointing}"}
        row |= {title: cell(size / 1e9) for title, size in sizes.items()}
        row |= {"step, s": cell(c.seconds), "tokens/s": f"{c.tokens_per_second:,.0f}", "MFU": f"{c.mfu:.0%}"}
        rows.append({**row, "days": cell(request.tokens / c.tokens_per_second / 86400)})
    return align([list(rows[0]), *(list(row.values()) for row in rows)], ("strategy", "layout", "batch"))


def config_lines(request: Request, taken: Candidate) -> list[str]:
    """A config file to paste: a whole model, or only what the plan adds to the user's recipe."""
    step = request.global_batch * request.model.block_size
    names = ("n_layer", "n_head", "n_embd", "bias") if request.cfg.model else ()
    ranks = taken.layout.data(taken.system.ranks)
    pipeline = ["compile = False", f"eval_iters = {math.ceil(request.recipe.eval_iters / ranks) * ranks}"]
    return [
        f"batch_size = {taken.batch}",
        f"gradient_accumulation_steps = {taken.micro_steps * ranks}  # all ranks together",
        f"activation_checkpointing = {taken.checkpointing}",
        f"dtype = '{taken.system.dtype}'",
        f"block_size = {request.model.block_size}",
        f"max_iters = {math.ceil(request.tokens / step)}  # {step:,} tokens each",
        *(f"{name} = {getattr(request.model, name)}" for name in names),
        *(f"{name}_parallel = {size}" for name, size in vars(taken.layout).items() if size > 1),
        *(pipeline if taken.layout.pipeline > 1 else []),
    ]


def command(request: Request, taken: Candidate) -> str:
    """The line that launches it; launchers named after a strategy select it by themselves."""
    strategy, system = taken.strategy, taken.system
    selecting = () if strategy.launcher == f"./launch_deepspeed_{strategy.name}.sh" else strategy.arguments
    arguments = [argument.format(half=system.gpus) for argument in selecting if "--strategy=" not in argument]
    arguments += ["--nvme_path=/local_nvme"] if strategy.optimizer_device == "nvme" else []
    arguments += [] if system.on_gpu else ["--device=cpu"]
    hosts = ["HOSTFILE=hostfile"] if system.nodes > 1 else []
    ranks = [str(system.gpus)] if system.nodes == 1 and strategy.name != "single" else []
    return " ".join([*hosts, strategy.launcher, *ranks, *request.recipes, CONFIG, *arguments])


def print_report(request: Request) -> None:
    """Print every candidate, or the best of each strategy, and what to do; UserError if none fits."""
    candidates = request.candidates(request.cfg.layouts)
    if request.recipe.layout() == Layout() and all(one.spare < 0 or one.offloads for one in candidates):
        candidates = request.candidates(search=True)
    if not candidates:
        raise UserError(f"strategies: not possible with {request.cfg.ranks} ranks on {request.cfg.nodes} nodes")
    bests = best_of_each(candidates)
    print(header(request), table(request, candidates if request.cfg.all else bests), FOOTER, sep="\n\n")
    taken = simplest(bests)
    if taken.spare < 0:
        lacking = f"{taken.name} comes nearest and lacks {gigabytes(-taken.spare)} per rank"
        raise UserError(f"nothing fits: {lacking}; take more or larger GPUs, or shorter sequences")
    print(f"\nTake {taken.name}, the simplest within {ALIKE:.0%} of the fastest that fits.")
    print(f"\n# {CONFIG}", *config_lines(request, taken), "", command(request, taken), sep="\n")


def print_curve(request: Request) -> None:
    """Print tokens/s per GPU from 1 to MOST_RANKS GPUs, "-" where nothing fits; if --curve is a PNG, draw it."""
    request = replace(request, cfg=replace(request.cfg, strategies=request.cfg.strategies or CURVE))
    fewest = math.prod(vars(request.recipe.layout()).values())
    counts = [2**power for power in range(MOST_RANKS.bit_length()) if 2**power >= fewest]
    rates = dict[str, dict[int, float]]()  # strategy -> GPUs -> tokens/s
    for ranks in counts:
        for best in best_of_each(request.at(ranks).candidates()):
            line = rates.setdefault(best.strategy.name.replace("single", "ddp"), {})  # on one GPU, DDP is one process
            if best.spare >= 0:
                line[ranks] = best.tokens_per_second / ranks
    rows = [["GPUs", *rates]]
    for ranks in counts:
        rows.append([f"{ranks:,}", *(f"{line[ranks]:,.0f}" if ranks in line else "-" for line in rates.values())])
    title = header(request.at(MOST_RANKS))
    print(title, "tokens/s per GPU", align(rows, ()), sep="\n\n")
    if (file := request.cfg.curve) != "table":
        draw(title, rates).savefig(file)
        print(f"\n{file}")


def draw(title: str, rates: dict[str, dict[int, float]]) -> Any:
    """A matplotlib figure of the table of print_curve."""
    figure = new_figure(8, 4)
    axes = figure.add_subplot(xlabel="GPUs", ylabel="tokens/s per GPU, where it fits")
    for number, (name, line) in enumerate(rates.items()):
        axes.plot(list(line), list(line.values()), marker=".", label=name if line else None, **line_style(number))
    axes.set_ylim(0)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.set_title("; ".join(title.splitlines()[:2]), fontsize=9, loc="left")
    style_axes(axes)
    label_ends(axes)
    return figure


def main() -> None:
    request = build_request(sys.argv[1:])
    (print_curve if request.cfg.curve else print_report)(request)


if __name__ == "__main__":
    run(main)
