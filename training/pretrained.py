"""Pretrained GPT-2 weights in Hugging Face's format, from the hub or a local folder, opened as a SavedState.

This is the only place that knows the names, layouts and settings of Hugging Face's GPT-2; tools/convert writes them.
"""

import json
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model import GPTConfig
from training.checkpoint import read_torch_file
from training.config import TrainConfig
from training.errors import CheckpointError, ConfigError, UserError
from training.model_state import TIED, WEIGHT, SavedState, check_parameters

HUB = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
WEIGHTS, PICKLE = "model.safetensors", "pytorch_model.bin"
FILES = f"config.json and {WEIGHTS}"
GELU = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "none"}  # activation_function -> GPTConfig.gelu
SIZES = {"block_size": "n_positions", **{name: name for name in ("vocab_size", "n_layer", "n_head", "n_embd")}}
# Settings in which a GPT-2 of theirs may vary, and the only values that our GPT computes.
FIXED_SETTINGS = {"layer_norm_epsilon": 1e-5, "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}
FIXED_SETTINGS |= {"tie_word_embeddings": True, "add_cross_attention": False}
# Their linear layers are Conv1D modules, whose weights are (in, out).
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def open_weights(source: str) -> tuple[GPTConfig, SavedState]:
    """Open the weights of a name in HUB or of a folder; memory-mapped, of any dtype, in one file or several."""
    folder = find_folder(source)
    if not (folder / "config.json").is_file():
        raise UserError(f"init_from = {source!r}: must be scratch, resume, {', '.join(HUB)}, or a folder with {FILES}")
    config = read_config(folder / "config.json")
    pieces, shapes = {}, {}
    for name, weight in read_weights(folder).items():
        name = f"transformer.{name.removeprefix('transformer.')}"
        if not name.endswith((".attn.bias", ".attn.masked_bias", TIED)):  # causal masks, and the tied embedding
            pieces[name, WEIGHT] = [weight.t() if name.endswith(TRANSPOSED) else weight]
            shapes[name] = pieces[name, WEIGHT][0].shape
    return config, check_parameters(SavedState(folder, shapes, pieces), config)


def start_from(cfg: TrainConfig, vocab_size: int) -> tuple[GPTConfig, SavedState]:
    """Open the weights that cfg.init_from names, cut to cfg.block_size positions, for data with vocab_size ids."""
    config, weights = open_weights(cfg.init_from)
    if cfg.block_size > config.block_size:
        raise ConfigError(f"block_size = {cfg.block_size}: must be at most {config.block_size}, as in {cfg.init_from}")
    if vocab_size > config.vocab_size:
        rule = f"has {vocab_size} ids, but the weights of {cfg.init_from} have {config.vocab_size}"
        raise ConfigError(f"dataset = {cfg.dataset!r}: {rule}; prepare it with the tokenizer gpt2")
    # SavedState reads a parameter from its beginning, so a smaller shape keeps the first positions.
    positions = torch.Size((cfg.block_size, config.n_embd))
    weights = replace(weights, shapes={**weights.shapes, "transformer.wpe.weight": positions})
    run_settings = {name: getattr(cfg, name) for name in ("block_size", "dropout", "activation_checkpointing")}
    return replace(config, **run_settings), weights


def find_folder(source: str) -> Path:
    """Return source as a path; for a name in HUB, its folder in Hugging Face's cache, downloaded if needed."""
    if source not in HUB or Path(source).exists():
        return Path(source)
    import huggingface_hub as hub

    try:
        for file in ("config.json", WEIGHTS):
            path: Any = hub.try_to_load_from_cache(HUB[source], file)
            if not isinstance(path, str):
                hub.get_session().head(hub.constants.ENDPOINT, timeout=5)  # without a network, it fails at once
                path = hub.hf_hub_download(HUB[source], file)
    except Exception as error:  # the exceptions of its HTTP library change from version to version
        fix = f"without a network, get {FILES} of {HUB[source]} elsewhere; give their folder instead of {source}"
        raise UserError(f"{source!r} cannot be downloaded ({type(error).__name__}); {fix}") from None
    return Path(path).parent


def read_config(path: Path) -> GPTConfig:
    """Read their config.json. Raises UserError for any model that our GPT would compute differently."""
    try:
        theirs = json.loads(path.read_bytes())
        kind, gelu = theirs.get("model_type"), theirs.get("activation_function", "gelu_new")
        sizes = {ours: theirs[name] for ours, name in SIZES.items()} if kind == "gpt2" else {}
    except (ValueError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} does not describe a GPT-2 ({type(error).__name__}: {error})") from None
    if kind != "gpt2" or str(gelu) not in GELU:
        raise UserError(f"{path} describes a {kind!r} model with {gelu!r}; only GPT-2 with GELU can be read")
    for name, value in {**FIXED_SETTINGS, "n_inner": 4 * sizes["n_embd"]}.items():
        if theirs.get(name) not in (None, value):
            raise UserError(f"{path}: {name} = {theirs[name]!r}; only GPT-2 with {name} = {value!r} can be read")
    return GPTConfig(**sizes, bias=True, gelu=GELU[gelu])


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
