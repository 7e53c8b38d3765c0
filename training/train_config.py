"""Every setting of a training run, its default and its meaning."""

from collections.abc import Iterator
from dataclasses import dataclass

from model import GPTConfig
from training.config import Problem, key
from training.distributed import DTYPES, world_size


@dataclass(frozen=True)
class TrainConfig:
    """nanoGPT's keys and defaults where they have the same meaning; `python train.py --help` prints this table."""

    out_dir: str = key("out", "run folder: metrics, checkpoints, loss.png", "Run")
    init_from: str = key(
        "scratch",
        "scratch; resume (go on with out_dir); gpt2, gpt2-medium, gpt2-large, gpt2-xl or a folder of such weights",
    )
    resume: str = key("", "auto: go on with out_dir if it holds a checkpoint, else start as init_from says")
    eval_only: bool = key(False, "evaluate once and stop")
    eval_interval: int = key(2000, "steps between evaluations, each followed by a checkpoint")
    eval_iters: int = key(200, "batches of each split in an evaluation, over all ranks")
    log_interval: int = key(1, "steps between lines in the log")
    always_save_checkpoint: bool = key(True, "save after every evaluation; False: only where val loss is the best yet")
    keep_checkpoints: int = key(2, "newest checkpoints to keep, besides the best")
    async_save: bool = key(False, "write checkpoints while training goes on, from a copy in the host's memory")
    max_minutes: float = key(0.0, "save and stop after so long, for a scheduler's time limit; 0: no limit")
    hang_minutes: float = key(10.0, "end a run that makes no progress for so long, and say where it hangs; 0: never")
    seed: int = key(1337, "weights, batches and dropout are functions of it")
    benchmark: bool = key(False, "time `steps` steps, without evaluation and checkpoints, and sum them up (speed.json)")
    steps: int = key(100, "of a run with --benchmark; the first three are not timed")

    wandb_log: bool = key(False, "log to Weights & Biases as well", "Weights & Biases")
    wandb_project: str = key("nanozero", "project name there")
    wandb_run_name: str = key("gpt2", "run name there")

    dataset: str = key("openwebtext", "folder under data/ (or a path) with train.bin and val.bin", "Data")
    gradient_accumulation_steps: int = key(40, "micro-steps in a step, all ranks together; divided by their number")
    batch_size: int = key(12, "sequences per rank per micro-step")
    block_size: int = key(1024, "tokens per sequence")

    n_layer: int = key(12, "blocks", "Model")
    n_head: int = key(12, "attention heads per block")
    n_embd: int = key(768, "width")
    dropout: float = key(0.0, "0 for pre-training; 0.1 and more for fine-tuning")
    bias: bool = key(False, "biases in linear layers and layer norms, as GPT-2 has")
    activation_checkpointing: bool = key(False, "recompute each block in backward: less memory, more work")

    learning_rate: float = key(6e-4, "peak learning rate", "Optimizer (AdamW)")
    max_iters: int = key(600000, "steps of the whole run")
    weight_decay: float = key(1e-1, "of matrices; biases and layer norms have none")
    beta1: float = key(0.9, "decay of the first moment")
    beta2: float = key(0.95, "decay of the second moment")
    grad_clip: float = key(1.0, "largest norm of the gradient; 0: no clipping")

    decay_lr: bool = key(True, "warm up, then cosine; False: constant", "Learning rate")
    warmup_iters: int = key(2000, "steps of linear warm-up")
    lr_decay_iters: int = key(600000, "step at which min_lr is reached")
    min_lr: float = key(6e-5, "learning rate from there on")

    device: str = key("auto", "auto, cpu, cuda, cuda:1, mps", "System")
    dtype: str = key("auto", "auto (bfloat16 or float16 on a GPU, float32 elsewhere), float32, bfloat16, float16")
    compile: bool = key(True, "torch.compile the model")
    backend: str = key("auto", "of the process group: auto, nccl, gloo")

    def model_config(self, vocab_size: int) -> GPTConfig:
        """vocab_size: the tokenizer's; large ones are padded to a multiple of 64, which matmuls are faster with."""
        padded = vocab_size if vocab_size < 1024 else -(-vocab_size // 64) * 64
        return GPTConfig(
            block_size=self.block_size,
            vocab_size=padded,
            n_layer=self.n_layer,
            n_head=self.n_head,
            n_embd=self.n_embd,
            dropout=self.dropout,
            bias=self.bias,
            activation_checkpointing=self.activation_checkpointing,
        )

    def problems(self) -> Iterator[Problem]:
        """The rules between and within keys, each with its fix."""
        for name in POSITIVE:
            if getattr(self, name) <= 0:
                yield name, "must be above 0"
        for name in NOT_NEGATIVE:
            if getattr(self, name) < 0:
                yield name, "must not be negative"
        if not self.out_dir:
            yield "out_dir", "must not be empty; name a folder"
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                yield name, f"must be one of {', '.join(choices)}"
        for name in ("dropout", "beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                yield name, "must be at least 0 and below 1"
        if self.benchmark and self.steps < 5:
            yield "steps", "must be 5 or more with --benchmark, as the first three are not timed"
        if self.benchmark and (self.init_from == "resume" or self.resume):
            yield "benchmark", "times a run of its own; leave out --init_from=resume and --resume"
        if self.n_head > 0 and self.n_embd > 0 and self.n_embd % self.n_head:
            near = self.n_head * round(self.n_embd / self.n_head) or self.n_head
            yield "n_embd", f"must be divisible by n_head = {self.n_head}; {near} is"
        ranks, micro_steps = world_size(), self.gradient_accumulation_steps
        if micro_steps > 0 and micro_steps % ranks:
            fits = " or ".join(str(n * ranks) for n in (micro_steps // ranks, micro_steps // ranks + 1) if n)
            yield "gradient_accumulation_steps", f"must be divisible by the {ranks} ranks that share it; set {fits}"


POSITIVE = (
    *("eval_interval", "eval_iters", "log_interval", "keep_checkpoints", "gradient_accumulation_steps"),
    *("batch_size", "block_size", "n_layer", "n_head", "n_embd", "learning_rate", "max_iters", "steps"),
)
NOT_NEGATIVE = (
    *("weight_decay", "grad_clip", "warmup_iters", "lr_decay_iters", "min_lr", "seed"),
    *("max_minutes", "hang_minutes"),
)
CHOICES = {"resume": ("", "auto"), "dtype": DTYPES, "backend": ("auto", "nccl", "gloo")}
