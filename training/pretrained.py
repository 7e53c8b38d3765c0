"""Pretrained weights in Hugging Face's format, from the hub or a local folder, opened as a SavedState."""

import json
import re
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model import GPTConfig
from training.config import TrainConfig
from training.errors import CheckpointError, ConfigError, UserError
from training.families import from_huggingface, is_gpt2, is_transposed, their_parameters
from training.model_state import TIED, WEIGHT, SavedState, check_parameters, model_shapes, read_torch_file

HUB = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
WEIGHTS, PICKLE = "model.safetensors", "pytorch_model.bin"
FILES = f"config.json and {WEIGHTS}"
# Tensors that are no parameters: causal masks of GPT-2, and angles of Llama
BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")


def open_weights(source: str) -> tuple[GPTConfig, SavedState]:
    """Open the weights of a name in HUB or of a folder; memory-mapped, of any dtype, in one file or several."""
    folder = find_folder(source)
    if not (folder / "config.json").is_file():
        raise UserError(f"init_from = {source!r}: must be scratch, resume, {', '.join(HUB)}, or a folder with {FILES}")
    config = read_config(folder / "config.json")
    tensors, saved = read_weights(folder), SavedState(folder, {}, {})
    if is_gpt2(config):  # OpenAI's own files leave out the first word
        short = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        tensors = {name if name == TIED else f"transformer.{name}": tensor for name, tensor in short.items()}
    for name in model_shapes(config):
        if parts := [tensors.pop(part) for part in their_parameters(name, config) if part in tensors]:
            parts = [part.t() for part in parts] if is_transposed(name, config) else parts
            saved.pieces[name, WEIGHT] = parts
            saved.shapes[name] = torch.Size((sum(len(part) for part in parts), *parts[0].shape[1:]))
    ignored = (*BUFFERS, TIED) if config.tied else BUFFERS
    rest = {name: tensor.shape for name, tensor in tensors.items() if not name.endswith(ignored)}
    saved.shapes.update(rest)  # which check_parameters reports
    return config, check_parameters(saved, config)


def start_from(cfg: TrainConfig, vocab_size: int) -> tuple[GPTConfig, SavedState]:
    """Open the weights that cfg.init_from names, cut to cfg.block_size positions, for data with vocab_size ids."""
    config, weights = open_weights(cfg.init_from)
    if cfg.block_size > config.block_size:
        raise ConfigError(f"block_size = {cfg.block_size}: must be at most {config.block_size}, as in {cfg.init_from}")
    if vocab_size > config.vocab_size:
        rule = f"has {vocab_size} ids, but the weights of {cfg.init_from} have {config.vocab_size}"
        raise ConfigError(f"dataset = {cfg.dataset!r}: {rule}; prepare it with the tokenizer of the weights")
    if not config.rope_theta:
        # SavedState reads a parameter from its beginning, so a smaller shape keeps the first positions.
        positions = torch.Size((cfg.block_size, config.n_embd))
        weights = replace(weights, shapes={**weights.shapes, "transformer.wpe.weight": positions})
    run_settings = {name: getattr(cfg, name) for name in ("block_size", "dropout", "activation_checkpointing")}
    return replace(config, **run_settings), weights


def find_folder(source: str) -> Path:
    """Return source as a path; for a name of the hub, its folder in Hugging Face's cache, downloaded if needed."""
    repository = HUB.get(source, source)
    if Path(source).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        return Path(source)
    import huggingface_hub as hub

    files = ["config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer.json", "tokenizer_config.json"]
    try:
        return Path(hub.snapshot_download(repository, allow_patterns=files))
    except Exception as error:  # the exceptions of its HTTP library change from version to version
        fix = f"without a network, get {FILES} of {repository} elsewhere; give their folder instead of {source}"
        raise UserError(f"{source!r} is no folder, and cannot be downloaded ({type(error).__name__}); {fix}") from None


def read_config(path: Path) -> GPTConfig:
    """Read their config.json. Raises UserError for any model that our GPT would compute differently."""
    try:
        return from_huggingface(json.loads(path.read_bytes()))
    except ConfigError as error:
        raise UserError(f"{path}: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} does not describe a model ({type(error).__name__}: {error})") from None


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Read all tensors of model.safetensors, else of pytorch_model.bin, or of the shards that its index lists."""
    name = next((name for name in (WEIGHTS, PICKLE) if any(folder.glob(f"{name}*"))), WEIGHTS)
    index, files = folder / f"{name}.index.json", [name]
    if not (folder / name).is_file() and index.is_file():
        try:
            files = sorted(set(map(str, json.loads(index.read_bytes())["weight_map"].values())))
        except (ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{index} cannot be read ({error}); download it again") from None
    tensors: dict[str, Tensor] = {}
    for file in files:
        if not (folder / file).is_file():
            raise CheckpointError(f"{folder} has no {file} (or {index.name}); download it, or use save_pretrained()")
        content = read_safetensors(folder / file)[0] if name == WEIGHTS else read_pickle(folder / file)
        if not isinstance(content, dict) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
            raise CheckpointError(f"{folder / file} must hold tensors by name; write it with save_pretrained()")
        tensors |= {str(key): tensor for key, tensor in content.items()}
    return tensors


def read_pickle(path: Path) -> Any:
    """Read a file of torch.save from elsewhere, and check it. Raises CheckpointError if it is damaged."""
    try:  # torch.load checks no CRC-32; files of torch before 1.6 are no zip archives
        damaged = zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip()
    except Exception as error:  # unzipping arbitrary bytes raises anything
        damaged = f"{type(error).__name__}: {error}"
    if damaged:
        raise CheckpointError(f"{path} is damaged ({damaged}); use another copy")
    return read_torch_file(path, mmap=False)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Map the tensors of any safetensors file; return its metadata too. Raises CheckpointError if it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{path} cannot be read ({error}); download or write it again") from None
