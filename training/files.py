"""Files: on the disk itself before their name counts, with a checksum, and read without running code."""

import io
import os
import pickle
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch

from training.errors import CheckpointError

PIECE = 2**24  # bytes at a time
Sum = tuple[int, str]  # a file's bytes, and their CRC-32 in hexadecimal


class Summed:
    """A file that is only written to, and adds up the CRC-32 of what is."""

    def __init__(self, file: IO[bytes]):
        self.file, self.size, self.crc = file, 0, 0

    def write(self, data: Any) -> int:
        self.crc, self.size = zlib.crc32(data, self.crc), self.size + len(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()

    @property
    def sum(self) -> Sum:
        return self.size, f"{self.crc:08x}"


def write(path: Path, state: Any) -> Sum:
    """torch.save, to the disk itself; with a full disk told as the OSError that it is."""
    with path.open("wb") as file:
        try:
            save(state, summed := Summed(file))
        except RuntimeError as error:  # torch's zip writer, when the file below it refused bytes
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
        return on_disk(summed)


def in_memory(state: Any) -> io.BytesIO:
    """The same file, in memory: a copy of all tensors of the state, on whatever device they are."""
    save(state, buffer := io.BytesIO())
    return buffer


def save(state: Any, file: Any) -> None:
    """torch.save without checksums of its own, which take as long as all the rest; see Sum."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state, file)
    finally:
        torch.serialization.set_crc32_options(before)


def put(path: Path, buffer: io.BytesIO) -> Sum:
    """What in_memory made, by the piece, so that other threads have their turn."""
    with path.open("wb") as file, buffer.getbuffer() as content:
        summed = Summed(file)
        for start in range(0, len(content), PIECE):
            summed.write(content[start : start + PIECE])
        return on_disk(summed)


def on_disk(written: Summed) -> Sum:
    written.flush()
    os.fsync(written.file.fileno())
    return written.sum


def checksum(path: Path, done: Callable[[int], object] = lambda size: None) -> Sum:
    """done: told of every piece that was read, in bytes."""
    with path.open("rb") as file:
        crc = rest(file, 0, done)
        return file.tell(), f"{crc:08x}"


def rest(file: IO[bytes], crc: int, done: Callable[[int], object] = lambda size: None) -> int:
    """crc, with all that follows in an open file added."""
    while piece := file.read(PIECE):
        crc = zlib.crc32(piece, crc)
        done(len(piece))
    return crc


def read(path: Path) -> Any:
    """What torch.save wrote, on the CPU and mapped, not copied; no code in a file is run."""
    with path.open("rb") as file:
        old = file.read(2) == b"\x80\x02"  # of torch before 1.6: no zip file, and not to be mapped
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=not old)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:  # EINVAL: seeking in what was cut off
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        code = asked and f"it asks for {asked[1]}, and whatever code that runs; only tensors and plain data are read"
        raise CheckpointError(f"{path} cannot be read: {code or str(error).splitlines()[0]}") from None


def write_text(path: Path, text: str) -> None:
    """Replace a small file at once."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(text)
    sync(unfinished)
    unfinished.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """To the disk itself, so that a rename never comes before the bytes it names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
