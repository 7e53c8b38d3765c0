"""The one writer of train.bin, val.bin and meta.json: a data set is whole, or it is the one that was there before."""

import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from data.dataset import shown
from data.errors import DataError
from data.tokenizer import Tokenizer

SPLITS = ("train", "val")


def dtype_of(vocab_size: int) -> np.dtype:
    """As narrow as the ids allow."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def packed(ids: np.ndarray, tokenizer: Tokenizer, end: bool) -> bytes:
    """Little-endian ids, all of them in the vocabulary; end: with the end of text, where the tokenizer has one."""
    if end and tokenizer.end_of_text is not None:
        ids = np.append(ids, tokenizer.end_of_text)
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < tokenizer.vocab_size:
        raise DataError(
            f"ids from {ids.min()} to {ids.max()}: {tokenizer.name!r} has those from 0 to {tokenizer.vocab_size - 1}; "
            "this is not the tokenizer they were made with"
        )
    return ids.astype(dtype_of(tokenizer.vocab_size)).tobytes()


class Writer:
    """with Writer(folder, tokenizer, source) as writer: writer.write("train", ids) ...; nothing appears before the end.

    source: where the text comes from, in words. Its bytes go to `writer.sha256` as they are read.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer, source: str):
        self.folder, self.tokenizer, self.source = folder, tokenizer, source
        self.dtype = dtype_of(tokenizer.vocab_size)
        self.sha256 = hashlib.sha256()
        self.tokens = dict.fromkeys(SPLITS, 0)

    def __enter__(self) -> "Writer":
        self.folder.mkdir(parents=True, exist_ok=True)
        self.files = {split: self.unfinished(f"{split}.bin").open("wb") for split in SPLITS}
        return self

    def unfinished(self, name: str) -> Path:
        return self.folder / f".{name}.unfinished"

    def write(self, split: str, ids: np.ndarray, end: bool = True) -> None:
        """ids of a document, or of its next part if it does not end here."""
        self.tokens[split] += self.files[split].write(packed(ids, self.tokenizer, end)) // self.dtype.itemsize

    def copy(self, split: str, path: Path) -> None:
        """Append ids that were packed before."""
        with path.open("rb") as file:
            shutil.copyfileobj(file, self.files[split], 2**20)
        self.tokens[split] += path.stat().st_size // self.dtype.itemsize

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            if kind is None:
                for file in self.files.values():
                    file.flush()
                    os.fsync(file.fileno())
                self.publish()
        finally:
            for split, file in self.files.items():
                self.unfinished(f"{split}.bin").unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # a full disk refuses the rest of the buffer, too
                    file.close()

    def publish(self) -> None:
        """Between the first rename and the last, meta.json says that the files do not belong together."""
        for split in SPLITS:
            if not self.tokens[split]:
                raise DataError(f"{self.source}: too little text, nothing is left for {split}.bin; give more")
        about = {
            "tokenizer": self.tokenizer.describe(),
            "dtype": self.dtype.name,
            "vocab_size": self.tokenizer.vocab_size,
            **{f"{split}_tokens": count for split, count in self.tokens.items()},
            "source": self.source,
            "sha256": self.sha256.hexdigest(),
        }
        self.write_meta({"unfinished": True})
        for split in SPLITS:
            self.unfinished(f"{split}.bin").replace(self.folder / f"{split}.bin")
        self.write_meta(about)

    def write_meta(self, about: dict[str, Any]) -> None:
        path = self.unfinished("meta.json")
        with path.open("w", encoding="utf-8") as file:
            json.dump(about, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        path.replace(self.folder / "meta.json")

    def report(self) -> str:
        counts = ", ".join(f"{split} {count:,} tokens" for split, count in self.tokens.items())
        return f"{shown(self.folder)}: {counts}, vocabulary {self.tokenizer.vocab_size:,}"
