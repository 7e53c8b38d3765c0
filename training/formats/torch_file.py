"""What torch.load reads, written without having it in memory, as torch.save must.

A zip file with nothing compressed: data.pkl is the state, pickled, with a note in place of each tensor's numbers;
data/0, data/1 ... are the numbers (torch.serialization, "Serialized file format for torch.save").
"""

import io
import math
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from training.errors import CheckpointError
from training.formats import lazy
from training.formats.lazy import Lazy

STORAGES = {
    **{torch.float32: torch.FloatStorage, torch.bfloat16: torch.BFloat16Storage, torch.float16: torch.HalfStorage},
    torch.int64: torch.LongStorage,
}
ALIGNMENT = 64  # bytes: a file that is mapped holds tensors that the processor takes as they are
ZIP64 = 20  # bytes that Python adds to a record's header, for sizes above 4 GB


@dataclass(frozen=True)
class Storage:
    key: str
    dtype: torch.dtype
    numel: int


class Foreign:
    """An object of a class that this process does not import; made by `foreign`."""

    def __init__(self, **state: Any):
        self.__dict__.update(state)


def foreign(path: str) -> type[Foreign]:
    """path: "package.module.Class" -> a class whose objects are pickled as that one's."""
    module, name = path.rsplit(".", 1)
    return type(name, (Foreign,), {"__module__": module})


class Pickler(pickle._Pickler):
    """Python's own, as the one in C does not let classes be named that are not there."""

    def __init__(self, file: IO[bytes]):
        super().__init__(file, protocol=2)
        self.tensors: list[Lazy] = []

    def reducer_override(self, obj: Any) -> Any:
        tensor = lazy.of(obj) if isinstance(obj, Tensor) else obj
        if not isinstance(tensor, Lazy):
            return NotImplemented
        storage = Storage(str(len(self.tensors)), tensor.dtype, tensor.numel)
        self.tensors.append(tensor)
        strides = tuple(math.prod(tensor.shape[i + 1 :]) for i in range(len(tensor.shape)))
        return torch._utils._rebuild_tensor_v2, (storage, 0, tensor.shape, strides, False, OrderedDict())

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, Storage):
            return "storage", STORAGES[obj.dtype], obj.key, "cpu", obj.numel
        return None

    def save_global(self, obj: Any, name: str | None = None) -> None:
        if isinstance(obj, type) and issubclass(obj, Foreign):
            self.write(pickle.GLOBAL + f"{obj.__module__}\n{obj.__name__}\n".encode())  # type: ignore[attr-defined]
            self.memoize(obj)  # type: ignore[attr-defined]
        else:
            super().save_global(obj, name)  # type: ignore[misc]


def check(path: Path) -> None:
    """By the checksums in a file of torch's. Raises CheckpointError where its bytes are not those that were written."""
    if not zipfile.is_zipfile(path):
        return  # of torch before 1.6, without any; or cut off, which whoever reads it is told
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except (zipfile.BadZipFile, NotImplementedError, EOFError, OSError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); take another file") from None
    if broken:
        raise CheckpointError(f"{path} is damaged: {broken} in it is not what was written; take another file")


def save(path: Path, state: Any) -> None:
    """state: dicts, lists, plain data, tensors and Lazy ones. One that stands in it twice is written once."""
    assert sys.byteorder == "little", "files are written little-endian"
    buffer = io.BytesIO()
    pickler = Pickler(buffer)
    pickler.dump(state)
    with zipfile.ZipFile(path, "w") as archive:
        write(archive, "data.pkl", buffer.getvalue())
        write(archive, "byteorder", b"little")
        for number, tensor in enumerate(pickler.tensors):
            with record(archive, f"data/{number}") as file:
                tensor.write(file)
        write(archive, "version", b"3\n")


def write(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    with record(archive, name) as file:
        file.write(content)


def record(archive: zipfile.ZipFile, name: str) -> IO[bytes]:
    """A file in the archive, open for writing, that begins at a multiple of ALIGNMENT."""
    info = zipfile.ZipInfo(f"archive/{name}")
    header = archive.start_dir + 30 + len(info.filename) + ZIP64 + 4
    padding = -header % ALIGNMENT
    info.extra = struct.pack(f"<HH{padding}x", 0x4246, padding)  # a field of its own, as torch.save's
    return archive.open(info, "w", force_zip64=True)
