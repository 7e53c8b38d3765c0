"""What a model holds by its config, against what was found of it."""

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch

from model import GPT, GPTConfig
from training.errors import CheckpointError, ConfigError, listed
from training.model_state import SavedState

EMBEDDING = "transformer.wte.weight"
SHOWN = 5  # of the problems


@lru_cache
def shapes(config: GPTConfig) -> dict[str, torch.Size]:
    """Of every parameter, in the order that optimizers have them; tied ones once."""
    with torch.device("meta"):
        return {name: parameter.shape for name, parameter in GPT(config).named_parameters()}


def checked(saved: SavedState, about: dict[str, Any]) -> SavedState:
    """saved, its parameters in the model's order. Raises CheckpointError for what is missing, or of another size."""
    try:
        wanted = shapes(GPTConfig(**about["model"]))
    except (TypeError, KeyError, AssertionError, RuntimeError, ZeroDivisionError) as error:
        raise CheckpointError(f"{saved.folder} is of no model that is known here ({error})") from None
    if problems := list(differences(saved, wanted)):
        first, *rest = listed(problems, "in its parameters").splitlines()
        raise CheckpointError(
            "\n".join([f"{saved.folder}: {first}", *rest[:SHOWN], *(["  ..."] if rest[SHOWN:] else [])])
        )
    return replace(saved, shapes=dict(wanted))


def differences(saved: SavedState, wanted: dict[str, torch.Size]) -> Iterator[str]:
    for name in dict.fromkeys([*wanted, *saved.shapes]):
        found, shape = saved.shapes.get(name), wanted.get(name)
        if found is None or shape is None:
            yield f"{name} is missing" if found is None else f"{name} is no parameter of the model"
        elif found != shape:
            yield f"{name} has shape {tuple(found)}, the model's config says {tuple(shape)}"
    for (name, kind), pieces in saved.pieces.items():
        numel = sum(piece.numel() for piece in pieces)
        if (
            name in wanted and saved.shapes.get(name) == wanted[name] and numel < wanted[name].numel()
        ):  # more is padding
            yield f"{name} has {wanted[name].numel():,} elements, {numel:,} of its {kind} are there"


def cut(saved: SavedState, about: dict[str, Any], vocab: int) -> tuple[SavedState, dict[str, Any]]:
    """Keep so many rows of the embedding: a part of a parameter is read from its beginning, so a shape is all."""
    rows, width = saved.shapes[EMBEDDING]
    ids = about.get("vocab_size") or rows
    if not ids <= vocab <= rows:
        raise ConfigError(f"--vocab={vocab}: the embedding has {rows} rows, for {ids} ids; keep {ids} to {rows}")
    model = {**about["model"], "vocab_size": vocab}
    return replace(saved, shapes={**saved.shapes, EMBEDDING: torch.Size((vocab, width))}), {**about, "model": model}
