"""Text from a trained model.

python sample.py --out_dir=out-shakespeare-char --start="ROMEO:" --num_samples=3
python sample.py --init_from=gpt2 --start=FILE:prompt.txt --temperature=0
"""

import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from data.errors import DataError
from data.tokenizer import Tokenizer, tokenizer_from
from model import GPT, GPTConfig
from training import checkpoint, distributed, ending, pretrained
from training.checkpoint import Checkpoints
from training.config import Problem, key, parse
from training.errors import ConfigError
from training.saved_state import open_state


@dataclass(frozen=True)
class SampleConfig:
    """nanoGPT's options for sampling."""

    out_dir: str = key("out", "run folder to take the newest checkpoint of", "Model")
    init_from: str = key(
        "resume", "resume (out_dir); gpt2, gpt2-medium, gpt2-large, gpt2-xl or a folder of such weights"
    )
    start: str = key("\n", "text to go on from, or FILE:prompt.txt", "Text")
    num_samples: int = key(10, "samples, drawn together as one batch")
    max_new_tokens: int = key(500, "tokens in each")
    temperature: float = key(0.8, "below 1 bolder, above 1 wilder; 0: always the likeliest token")
    top_k: int = key(200, "draw from this many likeliest tokens; 0: from all")
    top_p: float = key(1.0, "draw from the likeliest tokens that make up this much probability")
    seed: int = key(1337, "same seed, same text")
    device: str = key("auto", "auto, cpu, cuda, cuda:1, mps", "System")
    dtype: str = key("auto", "auto, float32, bfloat16, float16")
    compile: bool = key(False, "torch.compile the model")

    def problems(self) -> Iterator[Problem]:
        if not self.out_dir:
            yield "out_dir", "must not be empty; name a run folder"
        if self.seed >= 2**64:
            yield "seed", "must be below 2**64"
        for name in ("num_samples", "max_new_tokens"):
            if getattr(self, name) <= 0:
                yield name, "must be above 0"
        for name in ("temperature", "top_k", "seed"):
            if getattr(self, name) < 0:
                yield name, "must not be negative"
        if not 0 < self.top_p <= 1:
            yield "top_p", "must be above 0 and at most 1"
        if self.dtype not in distributed.DTYPES:
            yield "dtype", f"must be one of {', '.join(distributed.DTYPES)}"


def load(cfg: SampleConfig, device: torch.device) -> tuple[GPT, Tokenizer]:
    """The model, on device and in evaluation mode, and the tokenizer that it was trained with."""
    if cfg.init_from == "resume":
        folder, about = (checkpoints := Checkpoints(cfg.out_dir)).newest()
        checkpoints.verify(folder)
        config, tokenizer = GPTConfig(**{**about["model"], "dropout": 0.0}), tokenizer_from(about["tokenizer"])
        saved = open_state(folder, about)
    else:
        config, saved = pretrained.open_weights(cfg.init_from)
        tokenizer = tokenizer_from({"name": "gpt2"})
    with device:
        model = GPT(config)
    checkpoint.fill(model, saved.weights())
    return model.eval(), tokenizer


def prompt(start: str) -> str:
    if not start.startswith("FILE:"):
        return start
    path = Path(start.removeprefix("FILE:"))
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"start = {start!r}: cannot read {path} ({error}); name a UTF-8 text file") from None


def main() -> None:
    cfg = parse(SampleConfig, sys.argv[1:], __doc__ or "")
    device = distributed.pick_device(cfg.device, 0, 1)
    dtype = distributed.pick_dtype(cfg.dtype, device)
    model, tokenizer = load(cfg, device)
    try:
        ids = tokenizer.encode(prompt(cfg.start), allow_special=True)
    except DataError as error:
        raise ConfigError(f"start = {cfg.start!r}: {error}") from None
    if not len(ids):
        raise ConfigError(f"start = {cfg.start!r}: is empty; give at least one character")
    if cfg.compile:
        model.compile()
    torch.manual_seed(cfg.seed)
    tokens = torch.tensor(ids, dtype=torch.long, device=device).repeat(cfg.num_samples, 1)
    with torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext():
        texts = model.generate(
            tokens, cfg.max_new_tokens, cfg.temperature, cfg.top_k or None, cfg.top_p, tokenizer.vocab_size
        )
    for text in texts.tolist():
        print(tokenizer.decode(text))
        print("---------------")


if __name__ == "__main__":
    ending.run(main)
