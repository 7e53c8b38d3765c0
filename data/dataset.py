"""Open a prepared data set: two files of token ids and their description. Opening one reads no tokens."""

import io
import json
import math
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import DataError, check_types, did_you_mean
from data.tokenizer import CharTokenizer, Tokenizer, tokenizer_from

DATA_FOLDER = Path(__file__).resolve().parent
SPLITS = ("train", "val")
META: dict[str, type] = {"tokenizer": dict, "dtype": str, "vocab_size": int, "train_tokens": int, "val_tokens": int}


@dataclass(frozen=True)
class Dataset:
    """train.bin and val.bin hold little-endian token ids of `dtype`, all below vocab_size."""

    folder: Path
    tokenizer: Tokenizer
    dtype: np.dtype
    vocab_size: int
    tokens: dict[str, int]  # number of tokens by split, "train" or "val"
    val_bytes: int = 0  # of the text in val.bin; 0: not known

    def path(self, split: str) -> Path:
        return self.folder / f"{split}.bin"

    def bits_per_byte(self, val_loss: float) -> float | None:
        """val_loss in nats per token -> bits per byte of text, which compare different tokenizers; None: not known."""
        return val_loss / math.log(2) * (self.tokens["val"] / self.val_bytes) if self.val_bytes > 0 else None


def open_dataset(folder: Path) -> Dataset:
    """Open a folder written by a prepare.py, ours or nanoGPT's. Raises DataError if it is missing or damaged."""
    script = folder / "prepare.py"
    if all((folder / f"{split}.bin").is_file() for split in SPLITS):
        try:
            return read_dataset(folder)
        except DataError as error:
            raise DataError(f"{error}; prepare it again") from None
    if script.is_file():
        raise DataError(f"data set {folder.name!r} is not prepared; run: python {script}")
    if folder.exists():
        raise DataError(f"{folder} is not a data set: it must contain train.bin and val.bin")
    names = [path.name for path in folder.parent.iterdir() if path.is_dir()] if folder.parent.is_dir() else []
    hint = did_you_mean(folder.name, names) or "; to make one from your own text: python data/text/prepare.py --help"
    raise DataError(f"there is no data set {folder}{hint}")


def read_dataset(folder: Path) -> Dataset:
    """Read a folder's description and check the sizes of its files. open_dataset adds the fix to a DataError."""
    if (folder / "meta.json").is_file():
        meta = read_meta(folder / "meta.json")
    elif (folder / "meta.pkl").is_file():  # nanoGPT stores no dtype and no counts
        meta = {"tokenizer": read_pickle(folder / "meta.pkl")}
    else:
        meta = {"tokenizer": tokenizer_from({"name": "gpt2"})}
    dtype, tokens = np.dtype(meta.get("dtype", "uint16")).newbyteorder("<"), {}
    for split in SPLITS:
        path = folder / f"{split}.bin"
        size = path.stat().st_size
        tokens[split], remainder = divmod(size, dtype.itemsize)
        if remainder:
            raise DataError(f"{path}: {size:,} bytes are not a whole number of {dtype} ids")
        if tokens[split] != (expected := meta.get(f"{split}_tokens", tokens[split])):
            raise DataError(f"{path}: has {tokens[split]:,} tokens, meta.json says {expected:,}")
    return Dataset(folder, meta["tokenizer"], dtype, meta["tokenizer"].vocab_size, tokens, meta.get("val_bytes", 0))


def read_meta(path: Path) -> dict[str, Any]:
    """Read meta.json; "tokenizer" is the Tokenizer that it describes. Earlier versions left out val_bytes."""
    try:
        meta = json.loads(path.read_bytes())
        if problems := check_types(meta, META) or check_types({"val_bytes": 0, **meta}, {"val_bytes": int}):
            raise DataError("; ".join(problems))
        if meta["dtype"] not in ("uint16", "uint32"):
            raise DataError(f"dtype = {meta['dtype']!r}: must be uint16 or uint32")
        return {**meta, "tokenizer": tokenizer_from(meta["tokenizer"], path.parent)}
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except (ValueError, RecursionError) as error:  # ValueError: no UTF-8, or no JSON
        raise DataError(f"{path} is not JSON ({error})") from None


class PlainDataUnpickler(pickle.Unpickler):
    """Reads dicts, strings and numbers. Anything else would execute code and is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"refused to call {module}.{name}")


def read_pickle(path: Path) -> Tokenizer:
    """Read nanoGPT's meta.pkl: the characters by id."""
    try:
        itos = PlainDataUnpickler(io.BytesIO(path.read_bytes())).load()["itos"]
        tokenizer = CharTokenizer("".join(itos.values()))
        if dict(enumerate(tokenizer.characters)) != itos:
            raise ValueError("the characters are not sorted")
    except Exception as error:  # unpickling arbitrary bytes raises anything
        raise DataError(f"{path} is not a meta.pkl of nanoGPT ({type(error).__name__}: {error})") from None
    return tokenizer
