"""One safetensors file of a model's weights. Its header says which model they are of, so it can be read back.

safetensors' own save_file wants all tensors in memory. The format: README of github.com/huggingface/safetensors.
"""

import json
import re
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from training import files
from training.errors import CheckpointError
from training.formats import lazy
from training.formats.lazy import Lazy
from training.formats.options import Options
from training.model_state import TIED, SavedState
from training.sharding import WEIGHT

KINDS = (WEIGHT,)
SUM, NO_SUM = "crc32", b"00000000"  # the format has no checksum: ours is in its free metadata
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
ABOUT = ("model", "tokenizer", "vocab_size", "step", "best_val_loss", "init_from")


def read(path: Path) -> tuple[SavedState, dict[str, Any]]:
    tensors, metadata = mapped(path), header(path)
    if "model" not in metadata:
        raise CheckpointError(
            f"{path} does not say which model its {len(tensors)} tensors are of, as one written here does; "
            "if it is of a Hugging Face model, name the folder with its config.json"
        )
    try:
        about = {key: json.loads(metadata[key]) for key in ABOUT if key in metadata}
    except ValueError as error:
        raise CheckpointError(f"{path}: its header is damaged ({error}); take another file") from None
    pieces = {(name, WEIGHT): [tensor.flatten()] for name, tensor in tensors.items() if name != TIED}
    return SavedState(path, {name: tensors[name].shape for name, _ in pieces}, pieces), about


def mapped(path: Path) -> dict[str, Tensor]:
    """The tensors of any safetensors file. Raises CheckpointError where it is damaged."""
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path} cannot be read ({error}); fetch or write it again") from None
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        text = file.read(size)
        told = re.search(SUM.encode() + rb'": "(\w{8})"', text)
        if told and told[1] != with_sum(file, text, told.start(1)):
            raise CheckpointError(f"{path} is damaged: it is not what was written; fetch or write it again")
    return tensors


def with_sum(file: IO[bytes], text: bytes, place: int) -> bytes:
    """The CRC-32 of a file whose header is text, and has its CRC-32 at that place: as if there were zeros."""
    text = text[:place] + NO_SUM + text[place + len(NO_SUM) :]
    crc = files.rest(file, zlib.crc32(struct.pack("<Q", len(text)) + text))
    return f"{crc:08x}".encode()


def header(path: Path) -> dict[str, str]:
    """What a file that can be read says of itself."""
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def write(saved: SavedState, about: dict[str, Any], target: Path, options: Options) -> list[str]:
    tensors = {name: lazy.stored(saved, name, dtype=options.torch_dtype) for name in saved.shapes}
    tensors[TIED] = tensors["transformer.wte.weight"]  # the same here; other readers may not know
    save(target, tensors, {key: json.dumps(about[key]) for key in ABOUT if key in about})
    return []


def save(path: Path, tensors: Mapping[str, Lazy], metadata: dict[str, str]) -> None:
    """A safetensors file: the size of a header, the header, and the numbers of one tensor after the other."""
    header: dict[str, Any] = {"__metadata__": {**metadata, SUM: NO_SUM.decode()}}
    at = 0
    for name, tensor in tensors.items():
        place = [at, at := at + tensor.nbytes]
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": tensor.shape, "data_offsets": place}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the numbers begin at a multiple of 8
    with path.open("wb") as file:
        summed: Any = files.Summed(file)
        summed.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            tensor.write(summed)
        file.seek(8 + text.index(SUM.encode()) + len(f'{SUM}": "'))
        file.write(summed.sum[1].encode())
