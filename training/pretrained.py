"""OpenAI's GPT-2 weights, as Hugging Face keeps them, under our names: the one place that knows theirs."""

import json
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from model import GPTConfig
from training import checkpoint
from training.errors import ConfigError, UserError
from training.train_config import TrainConfig

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


def open_weights(source: str) -> tuple[GPTConfig, dict[str, Tensor]]:
    """source, a name of HUB or a folder -> the model's shape and its fp32 weights on the CPU, mapped where possible.

    Raises UserError where there is no such model, no network, or another architecture.
    """
    folder = download(source) if source in HUB else Path(source)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"init_from = {source!r}: must be scratch, resume, {', '.join(HUB)}, or a folder with {' and '.join(FILES)}"
        )
    return shape(folder / "config.json"), renamed(read(folder))


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


def renamed(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Left out is what is no parameter of ours: causal masks, and the output matrix, which is the embedding."""
    weights = {}
    for name, weight in theirs.items():
        name = name.removeprefix("transformer.")
        if not name.endswith((".attn.bias", ".attn.masked_bias")) and name != "lm_head.weight":
            weights[f"transformer.{name}"] = weight.t() if name.endswith(TRANSPOSED) else weight
    return weights


def read(folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if (path := folder / "model.safetensors").is_file():
        try:
            return load_file(path)
        except SafetensorError as error:
            raise UserError(f"{path} cannot be read ({error}); fetch it again") from None
    if (folder / "pytorch_model.bin").is_file():
        return checkpoint.read(folder / "pytorch_model.bin")
    raise UserError(f"{folder} holds no weights: neither model.safetensors nor pytorch_model.bin")


def download(name: str) -> Path:
    """Into Hugging Face's cache; a second call reads it from there."""
    import huggingface_hub

    try:
        paths = [huggingface_hub.hf_hub_download(HUB[name], file) for file in FILES]
    except Exception as error:  # its HTTP library's exceptions change from version to version
        raise UserError(
            f"init_from = {name!r}: cannot be downloaded ({type(error).__name__}); where there is no network, fetch "
            f"{' and '.join(FILES)} of {HUB[name]} elsewhere and set --init_from to their folder"
        ) from None
    return Path(paths[0]).parent


def start_from(cfg: TrainConfig, vocab_size: int) -> tuple[GPTConfig, dict[str, Tensor]]:
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
    weights["transformer.wpe.weight"] = weights["transformer.wpe.weight"][: cfg.block_size]
    config = replace(
        config,
        block_size=cfg.block_size,
        dropout=cfg.dropout,
        activation_checkpointing=cfg.activation_checkpointing,
    )
    return config, weights
