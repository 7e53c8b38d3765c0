"""Settings: a frozen, typed dataclass, filled from config files (plain assignments) and --key=value; later ones win."""

import ast
import dataclasses
import json
import math
import runpy
import signal
import sys
import textwrap
import traceback
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from data.errors import did_you_mean
from model import GPTConfig
from training.distributed import DTYPES, Layout, local_world_size, rank, world_size
from training.errors import ConfigError, list_problems

ROOT = Path(__file__).resolve().parent.parent  # the repository
T = TypeVar("T", bound="Settings")
Problem = tuple[str, str]  # key; the rule it breaks and the fix
Setting = tuple[str, Any, str]  # key, value, and the place where it is set
COMMAND_LINE = "command line"  # a place; its values are text, still to be converted to the key's type

DDP_KEYS = ("grad_compression", "outer_steps")
FSDP_KEYS = ("strategy", "reshard_after_forward", "shard_ranks", "cpu_offload")  # the first one enables the others
DEEPSPEED_KEYS = ("deepspeed_config", "tensor_parallel", "tensor_across_nodes", "pipeline_parallel", "expert_parallel")
KEYS_OF_THE_OTHER_SCRIPT = {
    **dict.fromkeys(DEEPSPEED_KEYS, "train_deepspeed.py and ./launch_deepspeed_*.sh"),
    **dict.fromkeys(FSDP_KEYS, "train.py and ./launch_fsdp.sh"),
    **dict.fromkeys(DDP_KEYS, "train.py and ./launch_traditional_ddp.sh"),
}
# Settings of one start of a run, which a resumed run does not take over.
OF_ONE_START = ("out_dir", "init_from", "resume", "eval_only", "max_minutes", "benchmark", "steps")
POSITIVE = """eval_interval eval_iters log_interval keep_checkpoints gradient_accumulation_steps batch_size block_size
    n_layer n_head n_embd n_active learning_rate muon_lr max_iters steps"""
NOT_NEGATIVE = """weight_decay grad_clip warmup_iters lr_decay_iters min_lr seed max_minutes hang_minutes
    n_hidden n_kv_head head_size rope_theta n_expert expert_balance outer_steps"""  # the last one: train.py only
MOST = 2**31 - 1  # of every whole number: torch and DeepSpeed keep many in 32 bits
CHOICES = {"resume": ("", "auto"), "dtype": DTYPES, "backend": ("auto", "nccl", "gloo"), "optimizer": ("adamw", "muon")}
CHOICES |= {"grad_dtype": DTYPES, "norm": ("layernorm", "rmsnorm"), "mlp": ("gelu", "swiglu", "relu2")}


def key(default: Any, meaning: str, section: str = "") -> Any:
    """A setting: its default, one line of meaning, and the section of --help that it opens."""
    return dataclasses.field(default=default, metadata={"meaning": meaning, "section": section})


class Settings:
    @classmethod
    def inherited(cls, values: dict[str, Any], places: dict[str, str]) -> Iterator[Setting]:
        """Settings that replace defaults, depending on the values that are set; places: key -> where it is set."""
        yield from ()

    def problems(self) -> Iterator[Problem]:
        """Rules within and between keys, each with its fix."""
        yield from ()


@dataclass(frozen=True)
class TrainConfig(Settings):
    """The settings of both train scripts, under nanoGPT's names where nanoGPT has them."""

    out_dir: str = key("out", "run folder: metrics, checkpoints, loss.png", "Run")
    init_from: str = key("scratch", "scratch; resume (out_dir, with its settings); gpt2 ... gpt2-xl; a weights folder")
    resume: str = key("", "auto: resume if out_dir holds a checkpoint, otherwise start as init_from says")
    eval_only: bool = key(False, "evaluate once and exit")
    eval_interval: int = key(2000, "steps between evaluations; each is followed by a checkpoint")
    eval_iters: int = key(200, "batches per split and evaluation, summed over all ranks")
    log_interval: int = key(1, "steps between log lines")
    always_save_checkpoint: bool = key(True, "save after every evaluation; False: only when val loss improves")
    keep_checkpoints: int = key(2, "newest checkpoints to keep, besides the best")
    async_save: bool = key(False, "write checkpoints in the background, from a copy in host memory")
    max_minutes: float = key(0.0, "save and stop after this many minutes, for a scheduler's time limit; 0: no limit")
    hang_minutes: float = key(10.0, "end a run that makes no progress for this long, with stack traces; 0: never")
    seed: int = key(1337, "seed of weights, batches and dropout")
    benchmark: bool = key(False, "time `steps` steps without evaluation or checkpoints; writes speed.json")
    steps: int = key(100, "steps of a --benchmark run; the first three are not timed")

    wandb_log: bool = key(False, "also log to Weights & Biases", "Weights & Biases, TensorBoard")
    wandb_project: str = key("nanozero", "project name")
    wandb_run_name: str = key("", "run name; empty: the name of out_dir")
    tensorboard: bool = key(False, "also log to TensorBoard, in out_dir/tensorboard")

    dataset: str = key("openwebtext", "folder under data/, or a path, with train.bin and val.bin", "Data")
    gradient_accumulation_steps: int = key(40, "micro-steps per step over all ranks; a multiple of the rank count")
    batch_size: int = key(12, "sequences per rank and micro-step")
    block_size: int = key(1024, "tokens per sequence")

    n_layer: int = key(12, "blocks", "Model")
    n_head: int = key(12, "attention heads per block")
    n_embd: int = key(768, "embedding width")
    dropout: float = key(0.0, "0 for pre-training, 0.1 or more for fine-tuning")
    bias: bool = key(False, "biases in linear layers and layer norms, as in GPT-2")
    norm: str = key("layernorm", "layernorm, rmsnorm")
    mlp: str = key("gelu", "gelu, swiglu, relu2 (ReLU squared)")
    n_hidden: int = key(0, "width inside the MLP; 0: 4 n_embd")
    n_kv_head: int = key(0, "heads of keys and values, each shared by several query heads; 0: n_head")
    head_size: int = key(0, "width of an attention head; 0: n_embd / n_head")
    qk_norm: bool = key(False, "RMSNorm of queries and keys")
    qkv_bias: bool = key(False, "biases of queries, keys and values, if bias is False")
    rope_theta: float = key(0.0, "base of rotary position embeddings, such as 10000; 0: learned position embeddings")
    n_expert: int = key(0, "experts (SwiGLU MLPs) of each block; 0: one MLP for all tokens")
    n_active: int = key(2, "experts that each token goes through")
    expert_balance: float = key(0.01, "weight of the loss that makes the routers use all experts")
    tied: bool = key(True, "one matrix for the token embedding and the output projection")
    activation_checkpointing: bool = key(False, "recompute each block in backward: less memory, a third more compute")

    optimizer: str = key("adamw", "adamw; muon (for the matrices inside the blocks, AdamW for the rest)", "Optimizer")
    learning_rate: float = key(6e-4, "peak learning rate of AdamW")
    muon_lr: float = key(0.02, "peak learning rate of Muon, which decays as learning_rate does")
    max_iters: int = key(600000, "steps of the whole run")
    weight_decay: float = key(1e-1, "weight decay of matrices; biases and layer norms have none")
    beta1: float = key(0.9, "decay rate of the first moment")
    beta2: float = key(0.95, "decay rate of the second moment")
    grad_clip: float = key(1.0, "maximum gradient norm; 0: no clipping")

    decay_lr: bool = key(True, "linear warm-up, then cosine decay; False: constant", "Learning rate")
    warmup_iters: int = key(2000, "warm-up steps")
    lr_decay_iters: int = key(600000, "step at which min_lr is reached")
    min_lr: float = key(6e-5, "learning rate after the decay")

    device: str = key("auto", "auto, cpu, cuda, cuda:1, mps", "System")
    dtype: str = key("auto", "auto (bfloat16 or float16 on GPUs, else float32), float32, bfloat16, float16")
    tf32: bool = key(True, "run float32 matmuls on GPUs as TF32, like nanoGPT; False: full precision")
    compile: bool = key(True, "torch.compile the model")
    backend: str = key("auto", "process group backend: auto, nccl, gloo")
    grad_dtype: str = key("auto", "dtype in which ranks average gradients; auto: float32, under ZeRO that of matmuls")
    sequence_parallel: int = key(1, "ranks that share each sequence, for long block_size (Ulysses)")

    def model_config(self, vocab_size: int) -> GPTConfig:
        """vocab_size: the tokenizer's. Large vocabularies are padded to a multiple of 64 for faster matmuls."""
        padded = vocab_size if vocab_size < 1024 else -(-vocab_size // 64) * 64
        shared = {field.name for field in dataclasses.fields(GPTConfig)} & vars(self).keys()
        return GPTConfig(vocab_size=padded, **{name: getattr(self, name) for name in shared})

    def layout(self) -> Layout:
        return Layout(**{name: getattr(self, f"{name}_parallel", 1) for name in vars(Layout())})

    @classmethod
    def inherited(cls, values: dict[str, Any], places: dict[str, str]) -> Iterator[Setting]:
        """With --init_from=resume, the settings of the run in out_dir. Raises ConfigError if they cannot be read."""
        path = Path(values["out_dir"]) / "config.json"
        if values["init_from"] == "resume" and path.is_file():
            try:
                yield from ((k, v, str(path)) for k, v in json.loads(path.read_text()).items() if k not in OF_ONE_START)
            except (ValueError, AttributeError, RecursionError):
                raise ConfigError(f"{path}: is damaged; remove it, and give the run's settings yourself") from None

    def problems(self) -> Iterator[Problem]:
        ranges = (
            (POSITIVE, lambda value: value > 0, "must be above 0"),
            (NOT_NEGATIVE, lambda value: value >= 0, "must not be negative"),
            ("dropout beta1 beta2", lambda value: 0 <= value < 1, "must be at least 0 and below 1"),
            ("max_minutes hang_minutes", lambda n: n <= 525_600, "must be at most 525,600 (a year); 0: no limit"),
        )
        for names, is_valid, rule in ranges:
            yield from ((name, rule) for name in names.split() if not is_valid(getattr(self, name, 1)))
        if not self.out_dir:
            yield "out_dir", "must not be empty; name a folder"
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                yield name, f"must be one of {', '.join(choices)}{did_you_mean(getattr(self, name), choices)}"
        if self.benchmark and self.steps < 5:
            yield "steps", "must be 5 or more with --benchmark, because the first three are not timed"
        if self.benchmark and (self.init_from == "resume" or self.resume):
            yield "benchmark", "cannot resume a run; remove --init_from=resume and --resume"
        if self.n_head > 0 and self.n_embd > 0:
            yield from self.head_problems()
        yield from self.rank_problems()

    def rank_problems(self) -> Iterator[Problem]:
        """Rules that depend on the number of ranks."""
        if self.n_expert > 0 or self.layout() != Layout():
            from training import parallel  # most runs do without it

            if problems := list(parallel.problems(self, self.layout(), world_size(), local_world_size())):
                yield from problems
                return
        ranks, micro_steps = self.layout().data(world_size()), self.gradient_accumulation_steps
        if micro_steps > 0 and micro_steps % ranks:
            multiples = " or ".join(str(n * ranks) for n in (micro_steps // ranks, micro_steps // ranks + 1) if n)
            name = "ranks" if ranks == world_size() else "data-parallel ranks"
            yield "gradient_accumulation_steps", f"must be divisible by the number of {name}, {ranks}; set {multiples}"

    def head_problems(self) -> Iterator[Problem]:
        if self.n_embd % self.n_head and not self.head_size:
            near = self.n_head * round(self.n_embd / self.n_head) or self.n_head
            yield "n_embd", f"must be divisible by n_head = {self.n_head}; set {near}"
        elif self.rope_theta and (self.head_size or self.n_embd // self.n_head) % 2:
            yield "rope_theta", "needs an even head_size, because pairs of its elements are rotated; set --head_size"
        if self.n_kv_head > 0 and self.n_head % self.n_kv_head:
            yield "n_kv_head", f"must divide n_head = {self.n_head}, or be 0 for as many"


@dataclass(frozen=True)
class PlainTrainConfig(TrainConfig):
    """The settings of train.py: those of both scripts, and FSDP2's."""

    strategy: str = key("auto", "auto (one process, or DDP on several ranks), ddp, fsdp", "Strategy")
    reshard_after_forward: bool = key(True, "fsdp: free a block's parameters after forward; False: SHARD_GRAD_OP")
    shard_ranks: int = key(0, "fsdp: ranks that share one copy of the model state (HSDP), such as a node's; 0: all")
    cpu_offload: bool = key(False, "fsdp: keep model state in host memory and run the optimizer on the CPU")
    grad_compression: str = key("none", "ddp: none, powersgd (for slow links; changes the run)")
    outer_steps: int = key(0, "ddp: steps that ranks train alone between two exchanges of weights (DiLoCo); 0: none")

    def strategy_name(self, ranks: int) -> str:
        """The strategy of a run: single, ddp or fsdp."""
        return self.strategy if self.strategy != "auto" else "ddp" if ranks > 1 else "single"

    def exchange_dtype(self) -> torch.dtype:
        return torch.float32 if self.grad_dtype == "auto" else getattr(torch, self.grad_dtype)

    @classmethod
    def inherited(cls, values: dict[str, Any], places: dict[str, str]) -> Iterator[Setting]:
        """A strategy that is named here replaces the run's, with all that belongs to it."""
        settings = super().inherited(values, places)
        yield from (setting for setting in settings if "strategy" not in places or setting[0] not in FSDP_KEYS)

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if self.strategy not in ("auto", "ddp", "fsdp"):
            yield "strategy", "must be one of auto, ddp, fsdp; for ZeRO use train_deepspeed.py"
        elif self.strategy != "fsdp":
            for name in FSDP_KEYS[1:]:
                if getattr(self, name) != PlainTrainConfig.__dataclass_fields__[name].default:
                    yield name, f"applies to FSDP only, and strategy is {self.strategy!r}; set --strategy=fsdp"
        ranks = world_size()
        if self.grad_compression not in ("none", "powersgd"):
            yield "grad_compression", "must be none or powersgd"
        used = [name for name in DDP_KEYS if getattr(self, name) not in ("none", 0)]
        if used and (self.strategy_name(ranks) != "ddp" or self.sequence_parallel > 1):
            yield used[0], "needs DDP on several ranks, without sequence_parallel; use ./launch_traditional_ddp.sh"
        if len(used) > 1:
            yield used[0], "cannot be combined with outer_steps, whose ranks exchange no gradients; set one of them"
        if self.shard_ranks < 0 or (self.shard_ranks and ranks % self.shard_ranks):
            divisors = [n for n in range(1, ranks + 1) if ranks % n == 0]
            yield "shard_ranks", f"must divide the number of ranks, {ranks}: 0, or one of {divisors}"


def parse(cls: type[T], argv: list[str], usage: str) -> T:
    """argv (config files and --key=value, in order) -> cls. Raises ConfigError, which lists every problem."""
    if "-h" in argv or "--help" in argv:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `--help | head` ends without a traceback
        print(help_text(cls, usage))
        sys.exit(0)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values: dict[str, Any] = {name: f.default for name, f in fields.items()}
    places: dict[str, str] = {}
    problems: list[str] = []
    mistyped: set[str] = set()

    def set_value(name: str, value: Any, place: str) -> None:
        if places.get(name) == COMMAND_LINE != place and rank() == 0:
            print(f"note: {place} sets {name} = {value!r:.200} after the command line did; the later one wins")
        try:
            values[name] = convert(name, value, fields, is_text=place == COMMAND_LINE)
            places[name] = place
        except ConfigError as error:
            mistyped.add(name)
            problems.append(f"{name} = {value!r:.200} ({place}): {error}")

    for setting in read_arguments(argv, values, problems):
        set_value(*setting)
    given = set(places)
    for name, value, place in cls.inherited(values, places):
        if name in fields and name not in given:
            set_value(name, value, place)
    settings = cls(**values)
    for name, rule in settings.problems():
        if name not in mistyped:
            problems.append(f"{name} = {values[name]!r} ({places.get(name, 'default')}): {rule}")
    if problems:
        raise ConfigError(list_problems(problems, "in the settings"))
    return settings


def read_arguments(argv: list[str], values: dict, problems: list[str]) -> Iterator[Setting]:
    """Yield the settings of each argument in order; arguments that cannot be read go to problems."""
    arguments = iter(argv)
    for argument in arguments:
        name, equals, value = argument.lstrip("-").partition("=")
        name = name.replace("-", "_")
        if argument == "--deepspeed" or name == "local_rank":  # which DeepSpeed's launcher and its users add
            continue
        if argument == "--deepspeed_config":
            yield name, next(arguments, ""), COMMAND_LINE
        elif not argument.startswith("-"):
            try:
                yield from read_file(Path(argument), values)
            except ConfigError as error:
                problems.append(str(error))
        elif equals or isinstance(values.get(name), bool):  # --benchmark is short for --benchmark=True
            yield name, value if equals else "True", COMMAND_LINE
        else:
            problems.append(f"{argument} ({COMMAND_LINE}): has no value; write {argument}=VALUE")


def read_file(path: Path, values: dict) -> Iterator[Setting]:
    """Run a config file, which sees the values set before it, and yield its assignments."""
    if not path.is_file():
        files = (str(file) for file in sorted(path.parent.glob("*.py")) if file.is_file())
        hint = f"; did you mean --{path}?" if "=" in path.name else did_you_mean(str(path), files)
        raise ConfigError(f"{path}: no such config file{hint}")
    if path.suffix == ".json":
        raise ConfigError(f"{path}: is not a config file; write train_deepspeed.py --deepspeed_config={path}")
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        result = runpy.run_path(str(path), init_globals=dict(values))
    except SyntaxError as error:  # in this file, or in one that it imports
        raise ConfigError(f"{error.filename or path}:{error.lineno or 1}: {error.msg}") from None
    except (Exception, SystemExit) as error:  # a config file is user code: any exception in it is the user's to fix
        lines = [f":{f.lineno}" for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
        reason = traceback.format_exception_only(error)[0].strip()
        raise ConfigError(f"{path}{lines[-1] if lines else ''}: {reason}") from None
    line_of = {n.id: n.lineno for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    for name, value in result.items():
        assigned = name in line_of or (name in values and value is not values[name])
        if assigned and not name.startswith("_") and (name in values or not callable(value)):
            yield name, value, f"{path}:{line_of.get(name, 1)}"


def convert(name: str, value: Any, fields: dict[str, dataclasses.Field], is_text: bool) -> Any:
    """Convert value to the key's type. Raises ConfigError, whose text leaves out key and value."""
    if name not in fields:
        scripts = KEYS_OF_THE_OTHER_SCRIPT.get(name)
        hint = f"; it belongs to {scripts}; run one of them" if scripts else did_you_mean(name, fields)
        raise ConfigError(f"unknown key{hint or '; see --help for all keys, and begin helper variables with _'}")
    kind: type = type(fields[name].default)
    if is_text and kind is bool:
        value = {"true": True, "false": False}.get(value.lower(), value)
    elif is_text:
        with suppress(ValueError):
            value = kind(value)
    if kind is float and type(value) is int:
        value = float(value) if abs(value) < 2**1000 else math.inf
    if type(value) is not kind:
        example = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}[kind]
        raise ConfigError(f"must be {example} ({kind.__name__})")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError("must be a finite number")
    if isinstance(value, int) and value > MOST:
        raise ConfigError(f"must be at most {MOST:,}")
    return value


def help_text(cls: type, usage: str) -> str:
    lines = [textwrap.dedent(usage).strip(), ""]
    for f in dataclasses.fields(cls):
        if f.metadata["section"]:
            lines += ["", f"{f.metadata['section']}:"]
        head = f"  --{f.name:<28}{type(f.default).__name__:<7}{f.default!s:<18}"
        lines += textwrap.wrap(head + f.metadata["meaning"], 118, subsequent_indent=" " * 57)
    return "\n".join(lines)
