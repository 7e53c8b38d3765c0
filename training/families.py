"""Hugging Face's families that model.py computes: their config.json as a GPTConfig and back, their parameters."""

import re
from typing import Any

from data.errors import check_types, did_you_mean
from model import GPTConfig
from training.errors import ConfigError

Json = dict[str, Any]
FAMILIES = ("gpt2", "llama", "mistral", "qwen2", "qwen3")
GELU = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "none"}  # activation_function -> GPTConfig.gelu
# GPTConfig's field -> theirs
GPT2_SIZES = {"block_size": "n_positions", **{name: name for name in ("vocab_size", "n_layer", "n_head", "n_embd")}}
LLAMA_SIZES = {"block_size": "max_position_embeddings", "vocab_size": "vocab_size", "n_layer": "num_hidden_layers"}
LLAMA_SIZES |= {"n_embd": "hidden_size", "n_hidden": "intermediate_size", "norm_eps": "rms_norm_eps"}
LLAMA_SIZES |= {"n_head": "num_attention_heads", "n_kv_head": "num_key_value_heads"}
# Settings in which a family may vary, and the only values that our GPT computes; a key that is missing has them, too.
GPT2_FIXED = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
LLAMA_FIXED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "partial_rotary_factor": 1.0}
LLAMA3_ROPE = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
GPT2_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
LLAMA_NAMES = {
    "transformer.wte": "model.embed_tokens",
    "transformer.ln_f": "model.norm",
    "lm_head": "lm_head",
    "ln_1": "input_layernorm",
    "ln_2": "post_attention_layernorm",
    "attn.c_attn": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
    "attn.c_proj": "self_attn.o_proj",
    "attn.q_norm": "self_attn.q_norm",
    "attn.k_norm": "self_attn.k_norm",
    "mlp.c_fc": "mlp.gate_proj mlp.up_proj",
    "mlp.c_proj": "mlp.down_proj",
}


def from_huggingface(theirs: Json) -> GPTConfig:
    """Their config.json as ours. Raises ConfigError for a model that our GPT would compute differently."""
    family = str(theirs.get("model_type"))
    if family not in FAMILIES:
        hint = did_you_mean(family, FAMILIES)
        raise ConfigError(f"model_type = {family!r}: must be one of {', '.join(FAMILIES)}{hint}")
    names, fixed = (GPT2_SIZES, GPT2_FIXED) if family == "gpt2" else (LLAMA_SIZES, LLAMA_FIXED)
    require(theirs, fixed)
    if problems := check_types(theirs, {name: float if name == "rms_norm_eps" else int for name in names.values()}):
        raise ConfigError("; ".join(problems))
    sizes = {ours: theirs[name] for ours, name in names.items()}
    if family == "gpt2":
        gelu = str(theirs.get("activation_function", "gelu_new"))
        require({"activation_function": gelu}, {"activation_function": gelu if gelu in GELU else "gelu_new"})
        eps, inner = theirs.get("layer_norm_epsilon", 1e-5), theirs.get("n_inner") or 0
        tied = theirs.get("tie_word_embeddings", True)
        return GPTConfig(**sizes, bias=True, gelu=GELU[gelu], norm_eps=eps, n_hidden=inner, tied=tied)
    if family == "mistral" or theirs.get("use_sliding_window"):  # up to its size, a window changes nothing
        window = theirs.get("sliding_window", 4096 if family == "mistral" else None)
        sizes["block_size"] = min(sizes["block_size"], window or sizes["block_size"])
    options = {"bias": False, "norm": "rmsnorm", "mlp": "swiglu", "tied": theirs.get("tie_word_embeddings", False)}
    options |= {"head_size": theirs.get("head_dim") or 0, "qkv_bias": family == "qwen2", "qk_norm": family == "qwen3"}
    return GPTConfig(**sizes, **read_rope(theirs), **options)


def read_rope(theirs: Json) -> Json:
    """transformers 5 writes one block, rope_parameters; earlier versions rope_theta and rope_scaling."""
    rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    theta = rope.get("rope_theta") or theirs.get("rope_theta", 10000.0)
    if rope.get("rope_type", rope.get("type", "default")) == "default":
        return {"rope_theta": theta}
    require(rope, LLAMA3_ROPE)
    return {"rope_theta": theta, "rope_factor": rope["factor"], "rope_length": rope["original_max_position_embeddings"]}


def require(theirs: Json, values: Json) -> None:
    for name, value in values.items():
        if theirs.get(name) not in (None, value):
            raise ConfigError(f"{name} = {theirs[name]!r}: only models with {name} = {value!r} can be read")


def is_gpt2(config: GPTConfig) -> bool:
    """Whether a model of one of the families is of GPT-2's, not of Llama's kind."""
    return config.norm == "layernorm"


def family_of(config: GPTConfig) -> str:
    """The family that computes the same. Raises ConfigError if there is none."""
    kinds = {
        "gpt2": ("layernorm", "gelu", False, False, False, True),
        "llama": ("rmsnorm", "swiglu", True, False, False, False),
        "qwen2": ("rmsnorm", "swiglu", True, False, True, False),
        "qwen3": ("rmsnorm", "swiglu", True, True, False, False),
    }
    kind = config.norm, config.mlp, bool(config.rope_theta), config.qk_norm, config.qkv_bias
    biases = config.bias or is_gpt2(config)  # GPT-2 without biases is one with zeros
    grouped = config.n_kv_head < config.n_head or config.head_size * config.n_head != config.n_embd
    for family, values in kinds.items():
        if (*kind, biases) == values and not (family == "gpt2" and grouped):
            return family
    raise ConfigError(f"no family of transformers computes {config}; --to=safetensors can store it")


def to_huggingface(config: GPTConfig, as_mistral: bool = False) -> Json:
    """Our config as their config.json. Raises ConfigError if no family computes it."""
    family = family_of(config)
    if as_mistral and family != "llama":
        raise ConfigError(f"--to=hf-mistral: this model computes as a {family}; write --to=hf")
    about: Json = {"model_type": family, "tie_word_embeddings": config.tied}
    if family == "gpt2":
        about |= {theirs: getattr(config, ours) for ours, theirs in GPT2_SIZES.items()} | GPT2_FIXED
        about |= {"layer_norm_epsilon": config.norm_eps, "n_inner": config.n_hidden}
        about["activation_function"] = next(theirs for theirs, ours in GELU.items() if ours == config.gelu)
        about |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout)
        return about | {"architectures": ["GPT2LMHeadModel"]}
    about |= {theirs: getattr(config, ours) for ours, theirs in LLAMA_SIZES.items()} | {"head_dim": config.head_size}
    about |= {"hidden_act": "silu", "rope_theta": config.rope_theta}
    if config.rope_factor != 1:
        length = {"factor": config.rope_factor, "original_max_position_embeddings": config.rope_length}
        about["rope_scaling"] = {**LLAMA3_ROPE, **length}
    if as_mistral:  # a Llama by another name, if it has no window
        about |= {"model_type": "mistral", "sliding_window": None}
    return about | {"architectures": [f"{about['model_type'].capitalize()}ForCausalLM"]}


def their_parameters(name: str, config: GPTConfig) -> dict[str, int | None]:
    """Their parameters that follow one another in ours, as q, k and v do in c_attn: name -> rows; None: all rows."""
    if is_gpt2(config):
        return {name: None}
    module, _, kind = name.rpartition(".")
    layer = re.match(r"transformer\.h\.(\d+)\.(.*)", module)
    names = LLAMA_NAMES[layer[2] if layer else module].split()
    prefix = f"model.layers.{layer[1]}." if layer else ""
    heads = [config.n_head, config.n_kv_head, config.n_kv_head]
    rows: dict[int, list] = {3: [count * config.head_size for count in heads], 2: [config.n_hidden] * 2, 1: [None]}
    return {f"{prefix}{theirs}.{kind}": count for theirs, count in zip(names, rows[len(names)], strict=True)}


def is_transposed(name: str, config: GPTConfig) -> bool:
    """GPT-2's linear layers are Conv1D modules, whose weights are (in, out)."""
    return is_gpt2(config) and name.endswith(GPT2_TRANSPOSED)
