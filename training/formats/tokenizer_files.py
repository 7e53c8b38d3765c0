"""A BPE of tiktoken as the files that Hugging Face's AutoTokenizer reads: tokenizer.json, tokenizer_config.json.

tokenizer.json is the format of the library `tokenizers`; it is plain JSON, written here without that library.
"""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from data.errors import DataError
from data.tokenizer import END_OF_TEXT, BPETokenizer

SAMPLE = "The 2 quick foxes' 12,345 jumps:\n\n\tnaïve café — 漢字 can't won't   end.  \n x = y**2  # ok"


def write(folder: Path, name: str, block_size: int) -> list[str]:
    """name: of an encoding. Returns what there is to say."""
    try:
        encoding = BPETokenizer(name).encoding()
    except DataError as error:
        return [f"without tokenizer files: {error}"]
    text = json.dumps(described(encoding), ensure_ascii=False)
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    end = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": block_size, **end}
    about["clean_up_tokenization_spaces"] = False
    (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n")
    if not find_spec("tokenizers"):
        return ["the tokenizer files were not tried: pip install tokenizers"]
    from tokenizers import Tokenizer

    ids = Tokenizer.from_str(text).encode(SAMPLE).ids
    assert ids == encoding.encode(SAMPLE), f"{name}: tokenizer.json has other ids than tiktoken for {SAMPLE!r}"
    return []


def described(encoding: Any) -> dict[str, Any]:
    ranks: dict[bytes, int] = encoding._mergeable_ranks
    letters = alphabet()
    names = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = [[names[left], names[right]] for left, right in pairs(ranks)]
    words = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    # a possessive {1,3}+ means something else to their engine, and where it stands it is no other than {1,3}
    pattern = {"Regex": encoding._pat_str.replace("{1,3}+", "{1,3}")}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": text, **flags} for text, i in encoding._special_tokens.items()],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False},
                words,
            ],
        },
        "post_processor": None,
        "decoder": words,
        "model": {
            **{"type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False, "byte_fallback": False},
            **{"continuing_subword_prefix": None, "end_of_word_suffix": None, "ignore_merges": True},
            **{"vocab": {names[token]: rank for token, rank in ranks.items()}, "merges": merges},
        },
    }


def pairs(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Every two tokens that make a third, the one of lowest rank first: as tiktoken merges."""
    found = []
    for token, rank in ranks.items():
        halves = [(token[:at], token[at:]) for at in range(1, len(token))]
        found += [
            (rank, ranks[left], ranks[right], left, right) for left, right in halves if left in ranks and right in ranks
        ]
    return [(left, right) for *_, left, right in sorted(found)]


def alphabet() -> list[str]:
    """A printable character for each byte, as GPT-2's BPE writes them (Radford et al., 2019, encoder.py): itself where
    it is one, the next free one from 256 on where it is not."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte if byte in plain else next(others)) for byte in range(256)]
