"""Tensors that are made while they are written: what is converted is never in memory as a whole."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import IO

import torch
from torch import Tensor

from training.model_state import CHUNK, SavedState
from training.sharding import WEIGHT


@dataclass(frozen=True, eq=False)
class Lazy:
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: Callable[[], Iterable[Tensor]]  # what follows one another in it, of any dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def write(self, file: IO[bytes]) -> None:
        """Its numbers, row by row, little-endian."""
        written = 0
        for part in self.parts():
            numbers = part.detach().to(self.dtype).flatten().contiguous().view(torch.uint8).numpy()
            file.write(numbers.data)
            written += numbers.nbytes
        assert written == self.nbytes, f"{written} bytes of {self.nbytes}: a tensor of shape {self.shape}"


def of(tensor: Tensor) -> Lazy:
    return Lazy(tuple(tensor.shape), tensor.dtype, lambda: [tensor])


def stored(saved: SavedState, name: str, kind: str = WEIGHT, dtype: torch.dtype = torch.float32) -> Lazy:
    """A parameter, or a moment of it."""
    shape = saved.shapes[name]
    return Lazy(tuple(shape), dtype, lambda: saved.chunks(name, kind, 0, shape.numel()))


def zeros(numel: int) -> Iterator[Tensor]:
    for at in range(0, numel, CHUNK):
        yield torch.zeros(min(CHUNK, numel - at))
