"""A target that was written, read back and compared with its source."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model import Block, GPTConfig, LayerNorm
from training.errors import UserError
from training.formats import lazy
from training.model_state import CHUNK, SavedState
from training.sharding import WEIGHT

SEQUENCES, TOKENS = 2, 16  # of the batch whose logits are compared
EPSILON = 1e-5  # of the largest logit: zero biases may be added by another kernel


class NotEqual(Exception):
    """What was read back is not what was written: a fault here, or of the disk."""


def tensors(saved: SavedState, again: SavedState, kinds: tuple[str, ...], dtype: torch.dtype) -> None:
    """Every parameter, in dtype, and every moment. What only the target has must be zeros: biases."""
    for name in again.shapes:
        for kind in kinds if name in saved.shapes else (WEIGHT,):
            if name in saved.shapes and saved.shapes[name] != again.shapes[name]:
                raise NotEqual(f"{name} has shape {tuple(again.shapes[name])}, not {tuple(saved.shapes[name])}")
            numel = again.shapes[name].numel()
            ours = saved.chunks(name, kind, 0, numel) if name in saved.shapes else lazy.zeros(numel)
            for expected, theirs in zip(ours, again.chunks(name, kind, 0, numel), strict=True):
                rounded = expected.to(dtype).float() if kind == WEIGHT else expected
                if not torch.equal(rounded.view(torch.int32), theirs.view(torch.int32)):  # bits: a NaN is one again
                    raise NotEqual(f"the {kind} of {name} is another one")
                if dtype == torch.float16 and not theirs.isfinite().all() and expected.isfinite().all():
                    raise UserError(f"{name} has values up to {expected.abs().max():.1e}: too large for float16")
    if missing := saved.shapes.keys() - again.shapes.keys():
        raise NotEqual(f"{min(missing)} is missing")
    if len(kinds) > 1 and saved.step != again.step:
        raise NotEqual(f"AdamW has made {again.step:g} steps, not {saved.step:g}")


def logits_differ(saved: SavedState, config: GPTConfig, again: SavedState, theirs: GPTConfig) -> tuple[float, float]:
    """The largest difference of the logits of a random batch, and the largest logit."""
    generator = torch.Generator().manual_seed(0)
    T = min(TOKENS, config.block_size)
    tokens = torch.randint(config.vocab_size, (SEQUENCES, T), generator=generator)
    expected, found = logits(saved, config, tokens), logits(again, theirs, tokens)
    return (expected - found).abs().max().item(), expected.abs().max().item()


@torch.inference_mode()
def logits(saved: SavedState, config: GPTConfig, tokens: Tensor) -> Tensor:
    """tokens (B, T) int64 -> (B, V) fp32, after the last of them; of the model, one block is in memory at a time."""
    C, embedding = config.n_embd, "transformer.wte.weight"
    rows = [saved.part(embedding, WEIGHT, int(token) * C, C) for token in tokens.flatten()]
    x = torch.stack(rows).view(*tokens.shape, C)
    x = x + saved.part("transformer.wpe.weight", WEIGHT, 0, tokens.size(1) * C).view(-1, C)
    for layer in range(config.n_layer):
        x = filled(Block(config, layer), saved, f"transformer.h.{layer}.")(x)
    x = filled(LayerNorm(config), saved, "transformer.ln_f.")(x)[:, -1]
    found = []
    for at in range(0, config.vocab_size, rows_at_once := max(1, CHUNK // C)):
        part = saved.part(embedding, WEIGHT, at * C, min(rows_at_once, config.vocab_size - at) * C)
        found.append(F.linear(x, part.view(-1, C)))
        saved.done(part.numel())
    return torch.cat(found, dim=1)


def filled(module: Any, saved: SavedState, prefix: str) -> Any:
    for name, parameter in module.named_parameters():
        parameter.copy_(saved.whole(prefix + name))
        saved.done(parameter.numel())
    return module.eval()
