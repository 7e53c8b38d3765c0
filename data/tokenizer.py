"""Tokenizers: text to ids and back. Each has a `description` in JSON, which meta.json and checkpoints store.

`encode` returns unsigned ids, one dimension. allow_special: encode END_OF_TEXT as `end_of_text`, not as characters.
"""

import shutil
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from data.errors import DataError, check_types, did_you_mean

END_OF_TEXT = "<|endoftext|>"
# Encodings of tiktoken: (number of ids, id of END_OF_TEXT). With this table, training needs no BPE file.
TIKTOKEN = {
    "gpt2": (50257, 50256),
    "r50k_base": (50257, 50256),
    "p50k_base": (50281, 50256),
    "cl100k_base": (100277, 100257),
    "o200k_base": (200019, 199999),
}


class ByteTokenizer:
    """The bytes of UTF-8; id 256 is the end of a text."""

    name, vocab_size, end_of_text = "byte", 257, 256
    description: ClassVar[dict[str, Any]] = {"name": name}

    def encode(self, text: str, allow_special: bool = False) -> np.ndarray:
        parts = text.split(END_OF_TEXT) if allow_special else [text]
        ids = [np.append(np.frombuffer(part.encode(), np.uint8), np.uint16(256)) for part in parts]
        return np.concatenate(ids)[:-1]

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(END_OF_TEXT.encode() if i == 256 else bytes([i]) for i in ids).decode(errors="replace")


class CharTokenizer:
    """One id for each character of a text, in sorted order; no other characters and no end of text."""

    def __init__(self, characters: str):
        self.characters = "".join(sorted(set(characters)))
        self.name, self.vocab_size, self.end_of_text = "char", len(self.characters), None
        self.description = {"name": self.name, "characters": self.characters}
        self.ids = {character: i for i, character in enumerate(self.characters)}

    def encode(self, text: str, allow_special: bool = False) -> np.ndarray:
        """Raises DataError for a character that is not in the vocabulary."""
        if unknown := "".join(sorted(set(text) - self.ids.keys())):
            raise DataError(f"characters {unknown[:20]!r} are not in the vocabulary; use only {self.characters!r}")
        return np.fromiter((self.ids[character] for character in text), np.uint32, len(text))

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.characters[i] for i in ids)


class BPETokenizer:
    """An encoding of tiktoken."""

    def __init__(self, name: str):
        self.end_of_text: int | None
        self.name, (self.vocab_size, self.end_of_text) = name, TIKTOKEN[name]
        self.description: dict[str, Any] = {"name": name}

    @cached_property
    def encoding(self) -> Any:
        """The tiktoken.Encoding, loaded at first use. Raises DataError if its BPE file cannot be downloaded."""
        import tiktoken

        try:
            return tiktoken.get_encoding(self.name)
        except (OSError, ValueError) as error:  # ValueError: a wrong file
            fix = "without a network, set TIKTOKEN_CACHE_DIR to a copy of the cache folder of a machine that has one"
            raise DataError(f"cannot download {self.name!r} from OpenAI ({type(error).__name__}); {fix}") from None

    def encode(self, text: str, allow_special: bool = False) -> np.ndarray:
        special = {END_OF_TEXT} if allow_special else set()
        return self.encoding.encode_to_numpy(text, allowed_special=special, disallowed_special=())

    def decode(self, ids: Sequence[int]) -> str:
        return self.encoding.decode([int(i) for i in ids])


Tokenizer = ByteTokenizer | CharTokenizer | BPETokenizer
TYPES: dict[str, dict] = {"char": {"characters": str}, "tokenizer.json": {"vocab_size": int, "sha256": str}}


def tokenizer_from(description: dict[str, Any], folder: Path = Path()) -> Tokenizer:
    """Make a tokenizer from its JSON description. folder: where its file is, if it has one. DataError."""
    problems = check_types(description, {"name": str})
    if problems := problems or check_types(description, TYPES.get(description["name"], {})):
        raise DataError(f"tokenizer: {'; '.join(problems)}")
    name = description["name"]
    if name == "byte":
        return ByteTokenizer()
    if name == "char":
        return CharTokenizer(description["characters"])
    if name in TIKTOKEN:
        return BPETokenizer(name)
    if name == "tokenizer.json":
        from data.hf_tokenizer import HFTokenizer  # few runs need it

        return HFTokenizer(description, folder)
    names = ["byte", "char", *TIKTOKEN]
    raise DataError(f"unknown tokenizer {name!r}{did_you_mean(name, names) or f'; choose from {names}'}")


def copy_files(tokenizer: Tokenizer, folder: Path) -> None:
    """Copy the files of a tokenizer that has some."""
    for file in getattr(tokenizer, "files", list)():
        if file.parent != folder:
            shutil.copy(file, folder)
