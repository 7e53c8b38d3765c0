"""Generate text with a trained model.

python sample.py --out_dir=out-shakespeare-char --start="ROMEO:" --num_samples=3
python sample.py --init_from=gpt2 --start=FILE:prompt.txt --temperature=0
"""

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.hf_tokenizer import from_model
from data.tokenizer import Tokenizer, tokenizer_from
from model import GPT, GPTConfig
from training import distributed, pretrained
from training.checkpoint import Checkpoints
from training.config import Problem, Settings, key, parse
from training.errors import ConfigError, UserError
from training.families import is_gpt2
from training.model_state import open_state


@dataclass(frozen=True)
class SampleConfig(Settings):
    """The settings of sample.py, under nanoGPT's names where nanoGPT has them."""

    out_dir: str = key("out", "run folder whose newest checkpoint is used", "Model")
    init_from: str = key("resume", "resume (use out_dir), or gpt2, gpt2-medium, gpt2-large, gpt2-xl, a weights folder")
    start: str = key("\n", "text to continue, or FILE:prompt.txt", "Text")
    num_samples: int = key(10, "number of samples, generated as one batch")
    max_new_tokens: int = key(500, "tokens generated per sample")
    temperature: float = key(0.8, "below 1 sharper, above 1 more random, 0 greedy")
    top_k: int = key(200, "sample from the k most likely tokens; 0: from all")
    top_p: float = key(1.0, "sample from the most likely tokens with this total probability (nucleus sampling)")
    seed: int = key(1337, "random seed")
    device: str = key("auto", "auto, cpu, cuda, cuda:1, mps", "System")
    dtype: str = key("auto", "auto, float32, bfloat16, float16")
    compile: bool = key(False, "torch.compile the model")

    def problems(self) -> Iterator[Problem]:
        for name, least in (("num_samples", 1), ("max_new_tokens", 1), ("temperature", 0), ("top_k", 0), ("seed", 0)):
            if getattr(self, name) < least:
                yield name, f"must be at least {least}"
        if not 0 < self.top_p <= 1:
            yield "top_p", "must be above 0 and at most 1"
        if self.dtype not in distributed.DTYPES:
            yield "dtype", f"must be one of {', '.join(distributed.DTYPES)}"


def load(cfg: SampleConfig, device: torch.device) -> tuple[GPT, Tokenizer]:
    """The model, on device and in evaluation mode, and its tokenizer."""
    if cfg.init_from == "resume":
        checkpoints = Checkpoints(cfg.out_dir)
        if not checkpoints.finished():
            fix = "set --out_dir to the folder of a run, or train one with ./launch_quickstart.sh"
            raise UserError(f"out_dir = {cfg.out_dir!r}: no checkpoint in {checkpoints.folder}; {fix}")
        folder, metadata = checkpoints.newest()
        config, saved = GPTConfig(**metadata["model"]), open_state(folder, metadata)
        tokenizer = tokenizer_from(metadata["tokenizer"], Path(cfg.out_dir))
    else:
        config, saved = pretrained.open_weights(cfg.init_from)
        tokenizer = tokenizer_from({"name": "gpt2"}) if is_gpt2(config) else from_model(saved.folder)
    with device:
        model = GPT(config).eval()
    saved.into(model)
    return model, tokenizer


def read_prompt(start: str, tokenizer: Tokenizer) -> np.ndarray:
    """Token ids of the text to continue. Raises ConfigError if it cannot be read or encoded, or is empty."""
    try:
        text = Path(start.removeprefix("FILE:")).read_text("utf-8") if start.startswith("FILE:") else start
        ids = tokenizer.encode(text, allow_special=True)
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, a NUL in the path, or a character without an id
        raise ConfigError(f"start = {start!r}: {error}; give text, or FILE: and the path of a UTF-8 file") from None
    if not len(ids):
        raise ConfigError(f"start = {start!r}: is empty; give at least one character")
    return ids


def choose_token(logits: Tensor, temperature: float, top_k: int, top_p: float, vocab_size: int) -> Tensor:
    """Sample one token per row: (B, V) -> (B, 1) int64.

    vocab_size: ids from here on, the padding of the vocabulary, are never sampled. top_p: nucleus sampling (Holtzman et
    al., arXiv:1904.09751).
    """
    logits = logits[:, :vocab_size].float()
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits / temperature
    if 0 < top_k < logits.size(-1):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
    probabilities = logits.softmax(dim=-1)
    if top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        ordered[ordered.cumsum(-1) - ordered >= top_p] = 0  # keeps the token that crosses top_p
        probabilities = torch.zeros_like(probabilities).scatter_(-1, order, ordered)
    return torch.multinomial(probabilities, 1)


def main() -> None:
    cfg = parse(SampleConfig, sys.argv[1:], __doc__ or "")
    device = distributed.pick_device(cfg.device, 0, 1)
    dtype = distributed.pick_dtype(cfg.dtype, device)
    model, tokenizer = load(cfg, device)
    ids = read_prompt(cfg.start, tokenizer)
    if cfg.compile:
        model.compile()
    torch.manual_seed(cfg.seed)
    tokens = torch.tensor(ids, dtype=torch.long, device=device).repeat(cfg.num_samples, 1)
    options = (cfg.temperature, cfg.top_k, cfg.top_p, tokenizer.vocab_size)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        samples = model.generate(tokens, cfg.max_new_tokens, lambda logits: choose_token(logits, *options))
    for sample in samples.tolist():
        print(tokenizer.decode(sample), "---------------", sep="\n")


if __name__ == "__main__":
    distributed.run(main)
