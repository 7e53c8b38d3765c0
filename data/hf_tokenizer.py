"""The tokenizer.json of a Hugging Face model. Its file is copied beside the data, and into the folder of each run."""

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from data.errors import DataError
from data.tokenizer import BPETokenizer

TOKENIZER_FILE, CONFIG = "tokenizer.json", "tokenizer_config.json"


class HFTokenizer(BPETokenizer):
    """folder: where the file is, which is needed to prepare data and to sample text, but not to train."""

    def __init__(self, description: dict[str, Any], folder: Path):
        self.description, self.name, self.path = description, TOKENIZER_FILE, folder / TOKENIZER_FILE
        self.vocab_size, self.end_of_text = description["vocab_size"], description.get("end_of_text")

    @cached_property
    def encoding(self) -> tokenizers.Tokenizer:
        """Raises DataError if the file is missing or another."""
        if not self.path.is_file():
            raise DataError(f"{self.path} is missing; copy it there from the data set or the model's folder")
        content = self.path.read_bytes()
        if hashlib.sha256(content).hexdigest() != self.description["sha256"]:
            raise DataError(f"{self.path} is another tokenizer than that of the data; copy the right one there")
        return tokenizers.Tokenizer.from_buffer(content)

    def files(self) -> list[Path]:
        """What AutoTokenizer reads."""
        return [path for path in (self.path, self.path.with_name(CONFIG)) if path.is_file()]

    def encode(self, text: str, allow_special: bool = False) -> np.ndarray:
        """allow_special: special tokens in the text are encoded as such, and the model's own begin it."""
        self.encoding.encode_special_tokens = not allow_special
        return np.array(self.encoding.encode(text, add_special_tokens=allow_special).ids, np.uint32)

    def decode(self, ids: Sequence[int]) -> str:
        return self.encoding.decode([int(i) for i in ids], skip_special_tokens=False)


def from_model(folder: Path) -> HFTokenizer:
    """The tokenizer in a model's folder; the end of a text is the eos_token of its tokenizer_config.json."""
    try:
        content = (folder / TOKENIZER_FILE).read_bytes()
        encoding = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # tokenizers raises plain Exception
        raise DataError(f"{folder / TOKENIZER_FILE} is no tokenizer of Hugging Face ({error})") from None
    config = folder / CONFIG
    end = json.loads(config.read_bytes()).get("eos_token") if config.is_file() else None
    end = encoding.token_to_id(end["content"] if isinstance(end, dict) else end) if end else None
    size = 1 + max(encoding.get_vocab(with_added_tokens=True).values())
    about = {"vocab_size": size, "end_of_text": end, "sha256": hashlib.sha256(content).hexdigest()}
    return HFTokenizer({"name": TOKENIZER_FILE, **about}, folder)
