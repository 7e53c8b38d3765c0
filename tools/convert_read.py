"""Reading of weights and checkpoints for tools.convert: recognize the format, open the model state, find its tokenizer.

Metadata is what a checkpoint.json holds: model, tokenizer, vocab_size, init_from, step, best_val_loss, evaluated; and
settings, the part of the run's config.json that a checkpoint of nanoGPT repeats.
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch.serialization import safe_globals

from data.errors import DataError
from data.hf_tokenizer import TOKENIZER_FILE, from_model
from data.tokenizer import tokenizer_from
from model import GPTConfig
from training import pretrained
from training.checkpoint import METADATA, Checkpoints, find_corruption, find_damage, read_metadata
from training.config import TrainConfig, parse
from training.deepspeed_layout import STAND_INS
from training.distributed import world_size
from training.errors import CheckpointError, ConfigError, UserError
from training.families import is_gpt2
from training.model_state import TIED, WEIGHT, SavedState, check_parameters, from_whole, model_shapes, open_state

Metadata = dict[str, Any]
Reader = Callable[[Path], tuple[SavedState, Metadata]]
ADAMW_KINDS = ("exp_avg", "exp_avg_sq")
NANOGPT_FILE = "ckpt.pt"
MODEL_ARGS = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
SETTINGS = ("dataset", "learning_rate", "weight_decay", "beta1", "beta2")
HEADER = ("model", "tokenizer", "vocab_size", "step", "best_val_loss", "init_from")  # of our safetensors files
DEFAULTS: Metadata = {"step": 0, "best_val_loss": None, "evaluated": False, "settings": {}, "folder": ""}
DEFAULTS |= {"optimizer": "adamw"}
GPT2_VOCABULARIES = (50257, 50304)  # as it is, and padded to a multiple of 64
READABLE = "a run folder or checkpoint, nanoGPT's ckpt.pt, a safetensors file, a universal checkpoint, a GPT-2 folder"


def open_source(source: str, tokenizer: Metadata | None = None) -> tuple[SavedState, Metadata]:
    """Open a path or a name on the hub. tokenizer: its describe(), for a source that names none. CheckpointError."""
    path = pretrained.find_folder(source)
    if (path / "latest_universal").is_file():  # DeepSpeed names the folder there
        path /= (path / "latest_universal").read_text().strip()
    if not (read := recognize(path)):
        known = ", ".join([READABLE, *pretrained.HUB])
        raise CheckpointError(f"{source} does not exist or is of no known format; give {known}")
    try:
        saved, metadata = read(path)
        config = GPTConfig(**metadata["model"])
        metadata = {**DEFAULTS, "init_from": source, **metadata, "model": asdict(config)}
    except (AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
        if read is read_run or isinstance(error, (UserError, DataError)):
            raise
        # Files that other programs wrote may hold anything; those of a run are checked before they are read.
        raise CheckpointError(f"{source} does not describe a GPT ({type(error).__name__}: {error})") from None
    return check_parameters(saved, config), add_tokenizer(metadata, tokenizer)


def recognize(path: Path) -> Reader | None:
    """Return the function that reads the format of a path; None if it has none of them."""
    if path.is_file():
        with path.open("rb") as file:
            start = file.read(16)
        if start[8:9] == b"{":  # the header follows its own length
            return read_safetensors
        return read_nanogpt if start[:2] in (b"PK", b"\x80\x02") else None  # zip file, or a pickle of torch < 1.6
    readers: dict[str, Reader] = {"zero/optimizer_state.pt": read_universal, METADATA: read_run}
    readers |= {"checkpoints": read_run, NANOGPT_FILE: read_nanogpt, "config.json": read_huggingface}
    return next((read for name, read in readers.items() if (path / name).exists()), None)


def read_run(folder: Path) -> tuple[SavedState, Metadata]:
    """Read the newest checkpoint of a run folder, or a folder that is one checkpoint, of any strategy."""
    if not (folder / METADATA).is_file():
        if not (finished := Checkpoints(str(folder)).finished()):
            raise CheckpointError(f"{folder}: the run has not saved a checkpoint yet")
        folder = finished[-1]
    check(folder)
    fitting = f"--gradient_accumulation_steps={world_size()}"  # tools run on any number of ranks
    settings = parse(TrainConfig, [f"--out_dir={folder.parent.parent}", "--init_from=resume", fitting], "")
    metadata = {"settings": {key: getattr(settings, key) for key in SETTINGS}, **read_metadata(folder)}
    metadata["folder"] = str(folder.parent.parent)  # where its tokenizer.json is
    return open_state(folder, metadata), metadata


def check(folder: Path) -> None:
    """Check every byte of a checkpoint. Raises CheckpointError."""
    if damage := find_damage(folder) or find_corruption(folder):
        raise CheckpointError(f"{folder} is damaged: {damage}; use another checkpoint")


def read_nanogpt(path: Path) -> tuple[SavedState, Metadata]:
    """Read nanoGPT's ckpt.pt, or the one in its out_dir; parameter names and order are those of our model."""
    path = path / NANOGPT_FILE if path.is_dir() else path
    state = pretrained.read_pickle(path)
    weights = {  # names without the prefixes of torch.compile and DDP
        name.replace("_orig_mod.", "").replace("module.", ""): weight
        for name, weight in state["model"].items()
        if not name.endswith((TIED, ".attn.bias"))  # attn.bias: the causal mask of attention without flash
    }
    model, settings, loss = state["model_args"], state.get("config") or {}, state.get("best_val_loss")
    return from_whole(path, weights, state.get("optimizer") or {}, {}), {
        "model": {key: model[key] for key in MODEL_ARGS if key in model},
        "step": int(state.get("iter_num", 0)),
        "best_val_loss": None if loss is None else float(loss),
        "evaluated": True,
        "settings": {key: settings[key] for key in SETTINGS if key in settings},
    }


def read_safetensors(path: Path) -> tuple[SavedState, Metadata]:
    """Read a file of weights that tools.convert wrote: its header holds the metadata."""
    tensors, header = pretrained.read_safetensors(path)
    if "model" not in header:
        raise CheckpointError(f"{path} was not written by tools.convert; for a Hugging Face model, give its folder")
    if json.loads(header["model"]).get("tied", True):
        tensors.pop(TIED, None)
    return from_whole(path, tensors, {}, {}), {key: json.loads(header[key]) for key in HEADER if key in header}


def read_huggingface(folder: Path) -> tuple[SavedState, Metadata]:
    config, saved = pretrained.open_weights(str(folder))
    metadata: Metadata = {"model": asdict(config), "folder": str(folder)}
    if not is_gpt2(config) and (folder / TOKENIZER_FILE).is_file():
        metadata["tokenizer"] = from_model(folder).description
    return saved, metadata


def read_universal(folder: Path) -> tuple[SavedState, Metadata]:
    """Read what DeepSpeed's ds_to_universal made of a run's checkpoint: a file for each parameter and moment."""
    try:  # ds_to_universal leaves out the model's shape, which is in the checkpoint.json of the run
        metadata = read_metadata(folder)
        expected = model_shapes(GPTConfig(**metadata["model"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        file = folder / METADATA
        raise CheckpointError(f"{file} cannot be read ({error}); copy that of the run's checkpoint") from None
    if metadata.get("strategy") == "universal":  # earlier versions of this tool wrote it, with checksums
        check(folder)
    with safe_globals(STAND_INS):
        state = pretrained.read_pickle(folder / "zero" / "optimizer_state.pt")
    step = state.get("optimizer_state_dict", {}).get("state", {}).get(0, {}).get("step")
    saved = SavedState(folder, {}, {})
    files = {file.parent.name: file for file in sorted(folder.glob("zero/*/fp32.pt"))}
    if TIED not in expected:
        files.pop(TIED, None)
    for name, file in files.items():
        for kind in (WEIGHT, *ADAMW_KINDS):
            content = pretrained.read_pickle(file if kind == WEIGHT else file.with_stem(kind))
            tensor = content["param"] if isinstance(content, dict) else content
            saved.pieces[name, kind] = [tensor.flatten()]
            shape = expected.get(name, tensor.shape)
            saved.shapes[name] = shape if shape.numel() == tensor.numel() else tensor.shape  # flat under ZeRO-3
        if step is None:
            step = pretrained.read_pickle(file.with_stem("step"))
    saved.step = float(step or 0)
    return saved, metadata


def add_tokenizer(metadata: Metadata, tokenizer: Metadata | None) -> Metadata:
    """Add the tokenizer: the source's own, the given one, GPT-2's if the vocabulary has its size, or None."""
    own, rows = metadata.get("tokenizer"), metadata["model"]["vocab_size"]
    if own and tokenizer and own != tokenizer:
        raise ConfigError(f"the source was trained with the tokenizer {own['name']!r}, not {tokenizer['name']!r}")
    tokenizer = own or tokenizer or ({"name": "gpt2"} if rows in GPT2_VOCABULARIES else None)
    ids = tokenizer_from(tokenizer).vocab_size if tokenizer else rows
    if tokenizer and ids > rows:
        problem = f"the embedding has {rows} rows, fewer than the {ids} ids of {tokenizer['name']!r}"
        raise CheckpointError(f"{metadata['init_from']}: {problem}; give another tokenizer")
    keys = ("model", "init_from", *DEFAULTS)  # the rest of a checkpoint.json describes its files
    return {**{key: metadata[key] for key in keys}, "tokenizer": tokenizer, "vocab_size": ids}
