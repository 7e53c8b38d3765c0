"""Weights that a run begins with: GPT-2's, from Hugging Face."""

from dataclasses import replace
from pathlib import Path

import torch

from model import GPTConfig
from training.errors import ConfigError, UserError
from training.formats import fit, huggingface
from training.formats.huggingface import FILES, HUB
from training.model_state import SavedState
from training.train_config import TrainConfig


def open_weights(source: str) -> tuple[GPTConfig, SavedState]:
    """source, a name of HUB or a folder -> the model's shape and its weights, mapped where possible.

    Raises UserError where there is no such model, no network, or another architecture.
    """
    folder = huggingface.download(source) if source in HUB else Path(source)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"init_from = {source!r}: must be scratch, resume, {', '.join(HUB)}, or a folder with {' and '.join(FILES)}"
        )
    saved, about = huggingface.read(folder)
    return GPTConfig(**about["model"]), fit.checked(saved, about)


def start_from(cfg: TrainConfig, vocab_size: int) -> tuple[GPTConfig, SavedState]:
    """The weights that cfg.init_from names, for a run with cfg's dropout and block_size on data of vocab_size ids."""
    config, weights = open_weights(cfg.init_from)
    if cfg.block_size > config.block_size:
        raise ConfigError(
            f"block_size = {cfg.block_size}: the weights of {cfg.init_from} have {config.block_size} positions; "
            "set at most that"
        )
    if vocab_size > config.vocab_size:
        raise ConfigError(
            f"dataset = {cfg.dataset!r}: has {vocab_size} ids, the weights of {cfg.init_from} know "
            f"{config.vocab_size}; prepare it with the tokenizer gpt2"
        )
    positions = torch.Size((cfg.block_size, config.n_embd))  # the first ones: a part is read from the beginning
    weights = replace(weights, shapes={**weights.shapes, "transformer.wpe.weight": positions})
    config = replace(
        config,
        block_size=cfg.block_size,
        dropout=cfg.dropout,
        activation_checkpointing=cfg.activation_checkpointing,
    )
    return config, weights
