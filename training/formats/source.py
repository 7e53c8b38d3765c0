"""Whatever weights or checkpoint a user has: what it is, and its model state."""

from pathlib import Path
from typing import Any

from data.dataset import open_dataset
from data.tokenizer import tokenizer_from
from model import GPTConfig
from training.errors import CheckpointError, ConfigError
from training.formats import fit, huggingface, nanogpt, run, universal, weights_file
from training.formats.huggingface import HUB
from training.formats.options import Options
from training.model_state import SavedState

GPT2 = (50257, 50304)  # its ids, and their number padded to a multiple of 64
UNKNOWN: dict[str, Any] = {"step": 0, "best_val_loss": None, "evaluated": False, "settings": {}}  # of weights alone
ABOUT = ("model", "tokenizer", "vocab_size", "init_from", *UNKNOWN)  # the rest of a checkpoint.json is of its files
KNOWN = "a run folder or checkpoint, nanoGPT's ckpt.pt, a safetensors file, a universal checkpoint, a GPT-2 folder"


def open_source(source: str, options: Options) -> tuple[SavedState, dict[str, Any]]:
    """source: a path, or a name of HUB -> its model state, and what a checkpoint.json says of it.

    Raises CheckpointError for what is none, is damaged, or does not fit its own description.
    """
    path = huggingface.download(source) if source in HUB and not Path(source).exists() else Path(source)
    kind = recognise(path)
    if kind is None:
        raise CheckpointError(f"{source}: {found(path)}; what can be read is {KNOWN}, or {', '.join(HUB)}")
    inside = path / nanogpt.FILE if kind is nanogpt and path.is_dir() else path
    saved, about = kind.read(inside)
    saved = fit.checked(saved, about)
    about = with_tokenizer({**UNKNOWN, "init_from": source, **about}, options)
    rows, ids = about["model"]["vocab_size"], about["vocab_size"]
    if ids > rows:
        name = about["tokenizer"]["name"]
        raise CheckpointError(
            f"{source}: its embedding has {rows} rows, {name!r} has {ids} ids; name another tokenizer"
        )
    return saved, about


def recognise(path: Path) -> Any:
    """The module of its format; None where there is none."""
    if path.is_file():
        start = first(path)
        if start[8:9] == b"{":  # behind the size of the header
            return weights_file
        return nanogpt if start[:2] in (b"PK", b"\x80\x02") else None  # a zip file, or a pickle of before that
    if path.is_dir() and universal.found(path):
        return universal
    if (path / "checkpoint.json").is_file() or (path / "checkpoints").is_dir():
        return run
    if (path / nanogpt.FILE).is_file():
        return nanogpt
    return huggingface if (path / "config.json").is_file() else None


def first(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(16)


def found(path: Path) -> str:
    """What is there instead, in words."""
    if not path.exists():
        return "there is no such file or folder"
    if path.is_file():
        return f"is a file of {path.stat().st_size:,} bytes that begins with {first(path)[:8]!r}"
    names = sorted(inside.name for inside in path.iterdir())
    if any(name.endswith("_states.pt") for name in names):
        return "is a checkpoint of DeepSpeed, without the checkpoint.json that train_deepspeed.py writes beside it"
    return f"holds {', '.join(names[:4])}{' ...' if len(names) > 4 else ''}" if names else "is an empty folder"


def with_tokenizer(about: dict[str, Any], options: Options) -> dict[str, Any]:
    """Which tokenizer its ids are of: what the source says; else the user; else GPT-2's, where their number is its."""
    vocab = GPTConfig(**about["model"]).vocab_size
    tokenizer: dict[str, Any] | None = about.get("tokenizer")
    if tokenizer and options.tokenizer and tokenizer != options.tokenizer:
        told, given = tokenizer["name"], options.tokenizer["name"]
        raise ConfigError(f"its ids are of the tokenizer {told!r}, not {given!r}: leave that out")
    tokenizer = tokenizer or options.tokenizer
    if tokenizer is None and (folder := nanogpt.dataset(about)):
        here = open_dataset(folder).tokenizer
        tokenizer = here.describe() if here.vocab_size <= vocab else None
    if tokenizer is None and vocab in GPT2:
        tokenizer = {"name": "gpt2"}
    ids = tokenizer_from(tokenizer).vocab_size if tokenizer else vocab
    about = {**about, "tokenizer": tokenizer, "vocab_size": ids}
    return {key: about[key] for key in ABOUT}


def need_tokenizer(about: dict[str, Any], source: str) -> None:
    """Raises ConfigError where a run could not go on, as nobody knows what its ids mean."""
    if about["tokenizer"] is None:
        raise ConfigError(
            f"{source} does not say which tokenizer its {about['vocab_size']} ids are of: give --tokenizer=gpt2 "
            "(or byte ...), or --dataset=FOLDER, a prepared data set of the same ids"
        )
