"""GPT-2 as Hugging Face keeps it, a folder with config.json: the one place that knows their names."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.tokenizer import TIKTOKEN, tokenizer_from
from model import GPTConfig
from training import files
from training.errors import CheckpointError, UserError
from training.formats import fit, lazy, tokenizer_files, torch_file
from training.formats.lazy import Lazy
from training.formats.options import Options
from training.formats.weights_file import mapped, save
from training.model_state import TIED, SavedState
from training.sharding import WEIGHT

KINDS = (WEIGHT,)
HUB = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
GELU = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "none"}
# Our names of their sizes, and what else a GPT-2 of theirs can vary: these values are the ones that ours has.
SIZES = {"block_size": "n_positions", **{name: name for name in ("vocab_size", "n_layer", "n_head", "n_embd")}}
ONLY = {
    **{"layer_norm_epsilon": 1e-5, "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False},
    **{"tie_word_embeddings": True, "add_cross_attention": False},
}
# Theirs are Conv1D layers, with weights (in, out).
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
FILES = ("config.json", "model.safetensors")
INDEXED = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def read(folder: Path) -> tuple[SavedState, dict[str, Any]]:
    """Weights of any dtype, in one file or several. Raises UserError for another architecture, or a damaged file."""
    config, theirs = shape(folder / "config.json"), tensors(folder)
    pieces: dict[tuple[str, str], list[Tensor]] = {}
    for name, weight in theirs.items():
        name = f"transformer.{name.removeprefix('transformer.')}"
        if not name.endswith((".attn.bias", ".attn.masked_bias", TIED)):  # causal masks; the embedding once more
            pieces[name, WEIGHT] = [weight.t() if name.endswith(TRANSPOSED) else weight]
    saved = SavedState(folder, {name: parts[0].shape for (name, _), parts in pieces.items()}, pieces)
    return saved, {"model": asdict(config), "init_from": str(folder)}


def shape(path: Path) -> GPTConfig:
    """Raises UserError for what our GPT does not compute: its weights would fit, and its text would be another."""
    try:
        theirs = json.loads(path.read_text())
        kind, gelu = theirs.get("model_type"), theirs.get("activation_function", "gelu_new")
        sizes = {ours: theirs[name] for ours, name in SIZES.items()} if kind == "gpt2" else {}
    except (ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is not a GPT-2's: {type(error).__name__}: {error}; fetch it again") from None
    if kind != "gpt2" or gelu not in GELU:
        raise UserError(f"{path} is of a {kind!r} model with {gelu!r}; only GPT-2 with GELU can be read")
    for name, value in {**ONLY, "n_inner": 4 * sizes["n_embd"]}.items():
        if theirs.get(name) not in (None, value):
            raise UserError(f"{path}: {name} = {theirs[name]!r}; only GPT-2 with {value!r} there can be read")
    return GPTConfig(**sizes, bias=True, gelu=GELU[gelu])


def tensors(folder: Path) -> dict[str, Tensor]:
    """Under their names, mapped: of safetensors where there are both, as no code can be in those."""
    readers: dict[str, Callable[[Path], Any]] = {"model.safetensors": mapped, "pytorch_model.bin": unpickled}
    for whole, reader in readers.items():
        index = folder / f"{whole}.index.json"
        if (folder / whole).is_file():
            return reader(folder / whole)
        if index.is_file():
            return indexed(index, reader)
    raise UserError(f"{folder} holds no weights: neither {' nor '.join(INDEXED)}")


def indexed(index: Path, reader: Callable[[Path], Any]) -> dict[str, Tensor]:
    """Of several files; index: says which tensor is in which."""
    try:
        places = dict(json.loads(index.read_text())["weight_map"])
        parts = sorted(set(places.values()))
        missing = [part for part in parts if not (index.parent / part).is_file()]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index} cannot be read ({type(error).__name__}: {error})") from None
    if missing:
        raise CheckpointError(f"{index.parent} lacks {missing[0]}, one of {len(parts)} files; fetch it again")
    found = {part: reader(index.parent / part) for part in parts}
    if lost := [name for name, part in places.items() if name not in found[part]]:
        part = places[lost[0]]
        raise CheckpointError(
            f"{index.parent / part} lacks {lost[0]}, which is there by {index.name}; fetch both again"
        )
    return {name: tensor for tensors in found.values() for name, tensor in tensors.items()}


def unpickled(path: Path) -> dict[str, Tensor]:
    torch_file.check(path)
    return files.read(path)


def download(name: str) -> Path:
    """Into Hugging Face's cache; a second call reads it from there."""
    import huggingface_hub

    try:
        paths = [huggingface_hub.hf_hub_download(HUB[name], file) for file in FILES]
    except Exception as error:  # its HTTP library's exceptions change from version to version
        raise UserError(
            f"{name!r} cannot be downloaded ({type(error).__name__}); where there is no network, fetch "
            f"{' and '.join(FILES)} of {HUB[name]} elsewhere, and name their folder instead of {name}"
        ) from None
    return Path(paths[0]).parent


def write(saved: SavedState, about: dict[str, Any], target: Path, options: Options) -> list[str]:
    """A folder for AutoModelForCausalLM and AutoTokenizer. Returns what there is to say about it."""
    config, notes = GPTConfig(**about["model"]), []
    target.mkdir()
    shards = list(split(dict(renamed(saved, config, options.torch_dtype)), options.max_shard_size))
    names = [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else ["model.safetensors"]
    for name, shard in zip(names, shards, strict=True):
        save(target / name, shard, {"format": "pt"})
    if len(shards) > 1:
        where = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
        dump(target / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})
    if not config.bias:
        notes.append("zero biases were added, as their GPT-2 has them and this model has none: the same logits")
    dump(target / "config.json", described(config, options.dtype) | special(about))
    padding = list(range(about.get("vocab_size") or config.vocab_size, config.vocab_size))
    if padding:
        notes.append(f"{len(padding)} rows of the embedding are padding, and stay: --vocab={padding[0]} cuts them")
    never = {"suppress_tokens": padding} if padding else {}
    dump(target / "generation_config.json", special(about) | never)
    if (tokenizer := about.get("tokenizer")) and tokenizer["name"] in TIKTOKEN:
        notes += tokenizer_files.write(target, tokenizer["name"], config.block_size)
    else:
        notes.append(f"without tokenizer files: they have none for {tokenizer['name'] if tokenizer else 'unknown'} ids")
    return notes


def renamed(saved: SavedState, config: GPTConfig, dtype: torch.dtype) -> Iterator[tuple[str, Lazy]]:
    for name, shape in fit.shapes(replace(config, bias=True)).items():
        if name not in saved.shapes:
            yield name, Lazy(tuple(shape), dtype, partial(lazy.zeros, shape.numel()))
        elif name.endswith(TRANSPOSED):
            yield name, Lazy((shape[1], shape[0]), dtype, partial(transposed, saved, name))
        else:
            yield name, lazy.stored(saved, name, dtype=dtype)


def transposed(saved: SavedState, name: str) -> Iterator[Tensor]:
    yield saved.whole(name).t()
    saved.done(saved.shapes[name].numel())


def split(tensors: dict[str, Lazy], most: float) -> Iterator[dict[str, Lazy]]:
    """Into files of at most so many bytes each, or of one tensor."""
    shard: dict[str, Lazy] = {}
    for name, tensor in tensors.items():
        if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > most:
            yield shard
            shard = {}
        shard[name] = tensor
    yield shard


def described(config: GPTConfig, dtype: str) -> dict[str, Any]:
    sizes = {theirs: getattr(config, ours) for ours, theirs in SIZES.items()}
    gelu = next(theirs for theirs, ours in GELU.items() if ours == config.gelu)
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout)
    about = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "torch_dtype": dtype}
    return about | sizes | {"activation_function": gelu} | dropout | ONLY


def special(about: dict[str, Any]) -> dict[str, Any]:
    """The id between documents, which is their beginning and end of a text; null where the tokenizer has none."""
    tokenizer = about.get("tokenizer")
    end = tokenizer_from(tokenizer).end_of_text if tokenizer else None
    return {"bos_token_id": end, "eos_token_id": end}


def dump(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
