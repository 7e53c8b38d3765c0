"""Tokenizers: text to ids and back. Each describes itself in JSON, which meta.json and checkpoints keep."""

import difflib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from data.errors import DataError

END_OF_TEXT = "<|endoftext|>"
# tiktoken's encodings: how many ids there are, and the id of the end of a text. Training needs no BPE file for these.
TIKTOKEN: dict[str, tuple[int, int | None]] = {
    "gpt2": (50257, 50256),
    "r50k_base": (50257, 50256),
    "p50k_base": (50281, 50256),
    "cl100k_base": (100277, 100257),
    "o200k_base": (200019, 199999),
}


class Tokenizer(Protocol):
    name: str
    vocab_size: int
    end_of_text: int | None  # the id between documents

    def encode(self, text: str, allow_special: bool = False) -> np.ndarray:
        """ids, one dimension, unsigned. allow_special: END_OF_TEXT in the text is that id, not characters."""

    def decode(self, ids: Sequence[int]) -> str: ...

    def describe(self) -> dict[str, Any]:
        """What `tokenizer_from` makes it again from."""


class ByteTokenizer:
    """The bytes of UTF-8, and 256 for the end of a text."""

    name, vocab_size = "byte", 257
    end_of_text: int | None = 256

    def encode(self, text: str, allow_special: bool = False) -> np.ndarray:
        parts = text.split(END_OF_TEXT) if allow_special else [text]
        ids = [np.append(self.encode_bytes(part.encode()), np.uint16(256)) for part in parts]
        return np.concatenate(ids)[:-1]

    def encode_bytes(self, text: bytes) -> np.ndarray:
        return np.frombuffer(text, np.uint8).astype(np.uint16)

    def decode(self, ids: Sequence[int]) -> str:
        parts: list[bytearray] = [bytearray()]
        for i in ids:
            if i == self.end_of_text:
                parts.append(bytearray())
            else:
                parts[-1].append(i)
        return END_OF_TEXT.join(part.decode(errors="replace") for part in parts)

    def describe(self) -> dict[str, Any]:
        return {"name": self.name}


class CharTokenizer:
    """An id for each character of one text, in sorted order; it has no other characters and no end of text."""

    name = "char"
    end_of_text: int | None = None

    def __init__(self, characters: str):
        self.characters = "".join(sorted(set(characters)))
        self.vocab_size = len(self.characters)
        self.codes = code_points(self.characters)

    def encode(self, text: str, allow_special: bool = False) -> np.ndarray:
        """Raises DataError where the text has a character that the vocabulary lacks."""
        codes = code_points(text)
        ids = np.searchsorted(self.codes, codes)
        known = self.codes[np.minimum(ids, self.vocab_size - 1)] == codes
        if not known.all():
            missing = "".join(sorted({chr(code) for code in codes[~known]}))
            raise DataError(f"the tokenizer lacks {missing[:20]!r}; it knows only {self.characters!r}")
        return ids.astype(np.uint32)

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.characters[i] for i in ids)

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "characters": self.characters}


def code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


class BPETokenizer:
    """An encoding of tiktoken, whose BPE file is loaded at first use."""

    def __init__(self, name: str):
        self.name = name
        self.vocab_size, self.end_of_text = TIKTOKEN[name]
        self.loaded: Any = None

    def encoding(self) -> Any:
        if self.loaded is None:
            import tiktoken

            try:
                self.loaded = tiktoken.get_encoding(self.name)
            except OSError as error:  # requests' exceptions are, too
                raise DataError(
                    f"the BPE file of {self.name!r} cannot be downloaded ({type(error).__name__}); where there is no "
                    "network, set TIKTOKEN_CACHE_DIR to a folder with tiktoken's cache from a machine that has one"
                ) from None
        return self.loaded

    def encode(self, text: str, allow_special: bool = False) -> np.ndarray:
        special = {END_OF_TEXT} if allow_special else set()
        return self.encoding().encode_to_numpy(text, allowed_special=special, disallowed_special=())

    def decode(self, ids: Sequence[int]) -> str:
        return self.encoding().decode([int(i) for i in ids])

    def describe(self) -> dict[str, Any]:
        return {"name": self.name}


def tokenizer_from(about: dict[str, Any]) -> Tokenizer:
    """What `describe` returned -> the tokenizer; DataError where there is none of that name."""
    name = about.get("name")
    if name == "byte":
        return ByteTokenizer()
    if name == "char":
        return CharTokenizer(about["characters"])
    if name in TIKTOKEN:
        return BPETokenizer(name)
    names = ["byte", "char", *TIKTOKEN]
    near = difflib.get_close_matches(str(name), names, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
    raise DataError(f"tokenizer {name!r}: unknown; {hint}")
