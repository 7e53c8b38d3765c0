"""A data set that a tiny model learns something from in 30 steps."""

from pathlib import Path

import numpy as np

from data.prepare import Writer
from data.tokenizer import ByteTokenizer


def words(folder: Path) -> Path:
    """Sentences of few words, byte by byte; always the same."""
    vocabulary = np.array(["a", "big", "cat", "and", "the", "dog", "see", "one", "red", "fox", "run", "home"])
    random, tokenizer = np.random.default_rng(0), ByteTokenizer()
    with Writer(folder, tokenizer, "words") as writer:
        for split, sentences in (("train", 2000), ("val", 400)):
            for _ in range(sentences):
                text = " ".join(random.choice(vocabulary, 8)) + ".\n"
                writer.write(split, tokenizer.encode(text), text=text)
    return folder
