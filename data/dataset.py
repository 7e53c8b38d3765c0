"""A prepared data set: two files of token ids and what they mean. Opening one reads no tokens."""

import difflib
import io
import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import DataError
from data.tokenizer import CharTokenizer, Tokenizer, tokenizer_from

HERE = Path(__file__).resolve().parent
DTYPES = ("uint16", "uint32")


@dataclass(frozen=True)
class Dataset:
    """train.bin and val.bin hold ids of `dtype`, little-endian, all below vocab_size."""

    folder: Path
    tokenizer: Tokenizer
    dtype: np.dtype
    vocab_size: int
    train_tokens: int
    val_tokens: int

    def path(self, split: str) -> Path:
        return self.folder / f"{split}.bin"

    def tokens(self, split: str) -> int:
        return self.train_tokens if split == "train" else self.val_tokens


def open_dataset(folder: Path) -> Dataset:
    """A folder that a prepare.py wrote, ours or nanoGPT's; DataError where it is missing or damaged."""
    if not (folder / "train.bin").is_file() or not (folder / "val.bin").is_file():
        raise DataError(missing(folder))
    tokenizer, dtype, counts = describe(folder)
    for split in ("train", "val"):
        path = folder / f"{split}.bin"
        tokens, rest = divmod(path.stat().st_size, dtype.itemsize)
        if rest:
            raise DataError(f"{path} has an odd size: {path.stat().st_size:,} bytes of {dtype} ids; {again(folder)}")
        if counts.setdefault(split, tokens) != tokens:
            raise DataError(f"{path} has {tokens:,} tokens, meta.json says {counts[split]:,}; {again(folder)}")
    return Dataset(folder, tokenizer, dtype, tokenizer.vocab_size, counts["train"], counts["val"])


def again(folder: Path) -> str:
    """The fix of most things that can be wrong with a data set."""
    script = folder / "prepare.py"
    return f"prepare it again with: python {shown(script)}" if script.is_file() else "prepare it again"


def missing(folder: Path) -> str:
    """What to say of a folder that holds no data set."""
    if (folder / "prepare.py").is_file():
        return f"data set {folder.name!r} is not prepared; run: python {shown(folder / 'prepare.py')}"
    if folder.exists():
        return f"{folder} holds no data set: train.bin and val.bin must both be there; {again(folder)}"
    names = [path.name for path in folder.parent.iterdir() if path.is_dir()] if folder.parent.is_dir() else []
    near = difflib.get_close_matches(folder.name, names, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return (
        f"there is no data set {shown(folder)}; {hint}Make one of your own text with: "
        f"python data/text/prepare.py --input FILES --tokenizer gpt2 --name {folder.name}"
    )


def shown(path: Path) -> str:
    """As users type it: from the repository's folder."""
    return str(path.relative_to(HERE.parent) if path.is_relative_to(HERE.parent) else path)


def describe(folder: Path) -> tuple[Tokenizer, np.dtype, dict[str, int]]:
    """Tokenizer, dtype and the token counts of the splits, as far as the folder tells."""
    if (folder / "meta.json").is_file():
        return read_meta(folder / "meta.json")
    nanogpt = np.dtype("<u2")
    if (folder / "meta.pkl").is_file():
        return read_pickle(folder / "meta.pkl"), nanogpt, {}
    return tokenizer_from({"name": "gpt2"}), nanogpt, {}


def read_meta(path: Path) -> tuple[Tokenizer, np.dtype, dict[str, int]]:
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        if "unfinished" in about:
            raise DataError(f"{path.parent} was being prepared when that was interrupted; {again(path.parent)}")
        tokenizer, dtype = tokenizer_from(about["tokenizer"]), about["dtype"]
        counts = {split: int(about[f"{split}_tokens"]) for split in ("train", "val")}
        rules = {
            f"dtype = {dtype!r}: must be one of {', '.join(DTYPES)}": dtype in DTYPES,
            f"vocab_size = {about['vocab_size']!r}: the tokenizer has {tokenizer.vocab_size}": about["vocab_size"]
            == tokenizer.vocab_size,
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: {error} is missing or of a wrong type; {again(path.parent)}") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: is not JSON ({error.msg}); {again(path.parent)}") from None
    for rule, kept in rules.items():
        if not kept:
            raise DataError(f"{path}: {rule}; {again(path.parent)}")
    return tokenizer, np.dtype(dtype).newbyteorder("<"), counts


class DataOnly(pickle.Unpickler):
    """Reads dicts, text and numbers. Anything else in a pickle is a call of some code, and refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it wants to call {module}.{name}")


def read_pickle(path: Path) -> Tokenizer:
    """nanoGPT's meta.pkl: the characters by id."""
    try:
        itos = DataOnly(io.BytesIO(path.read_bytes())).load()["itos"]
        characters = "".join(itos[i] for i in range(len(itos)))
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is not nanoGPT's: {error}; {again(path.parent)}") from None
    tokenizer = CharTokenizer(characters)
    if tokenizer.characters != characters:
        raise DataError(f"{path}: the characters are not in sorted order; {again(path.parent)}")
    return tokenizer
