"""A model state on disk, read by the piece: whoever needs a part of a parameter or moment reads that part only."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from training.errors import CheckpointError
from training.sharding import KINDS, MOMENTS, WEIGHT, own

TIED = "lm_head.weight"  # the same as the embedding's
CHUNK = 2**20  # elements that a conversion reads at a time: 4 MiB


@dataclass
class SavedState:
    """step: AdamW's count of updates; scaler: of fp16's loss, as torch's GradScaler names what it holds."""

    folder: Path
    shapes: dict[str, torch.Size]  # of every parameter; tied ones once
    pieces: dict[tuple[str, str], list[Tensor]]  # (parameter, kind) -> what follows one another in it
    step: float = 0.0
    scaler: dict[str, Any] = field(default_factory=dict)
    done: Callable[[int], object] = lambda numel: None  # told of every chunk, when it has been used

    def part(self, name: str, kind: str, start: int, numel: int) -> Tensor:
        """Elements start ... start + numel of the flat parameter or moment, fp32, on the CPU."""
        found, at = [], 0
        for piece in self.pieces[name, kind]:
            low, high = max(start - at, 0), min(start + numel - at, piece.numel())
            if low < high:
                found.append(stretch(piece, low, high))
            at += piece.numel()
        return (found[0] if len(found) == 1 else torch.cat(found or [torch.empty(0)])).float()

    def chunks(self, name: str, kind: str, start: int, numel: int) -> Iterator[Tensor]:
        """The same, CHUNK elements at a time."""
        for at in range(start, start + numel, CHUNK):
            size = min(CHUNK, start + numel - at)
            yield self.part(name, kind, at, size)
            self.done(size)

    def whole(self, name: str, kind: str = WEIGHT) -> Tensor:
        return self.part(name, kind, 0, self.shapes[name].numel()).view(self.shapes[name])

    @property
    def has_moments(self) -> bool:
        return all((name, kind) in self.pieces for name in self.shapes for kind in MOMENTS)

    def with_moments(self) -> "SavedState":
        """Itself, or, where it is weights alone, with those of an AdamW that has made no step."""
        if self.has_moments:
            return self
        zeros = {(n, kind): [torch.zeros(()).expand(self.shapes[n].numel())] for n in self.shapes for kind in MOMENTS}
        return replace(self, pieces={**self.pieces, **zeros}, step=0.0)

    def require_moments(self) -> None:
        if lacking := [name for name in self.shapes if (name, MOMENTS[0]) not in self.pieces]:
            raise CheckpointError(f"{self.folder} holds no moments of AdamW for {lacking[0]}; take another checkpoint")

    def weights(self) -> dict[str, Tensor]:
        return {name: self.whole(name) for name in self.shapes}

    @torch.no_grad()
    def into(self, model: nn.Module, optimizer: Optimizer) -> None:
        """A model, and its AdamW: whole or, under FSDP2, this rank's shard."""
        self.require_moments()
        parameters = dict(model.named_parameters())
        assert parameters.keys() == self.shapes.keys(), f"other parameters: {parameters.keys() ^ self.shapes.keys()}"
        for name, parameter in parameters.items():
            state = optimizer.state[parameter] = fresh_state(optimizer, parameter, self.step)
            for kind, tensor in {**state, WEIGHT: parameter}.items():
                if kind in KINDS:
                    mine, start = own(tensor)
                    mine.copy_(self.part(name, kind, start, mine.numel()).view_as(mine))
                    self.done(mine.numel())


def stretch(piece: Tensor, low: int, high: int) -> Tensor:
    """Elements low ... high of the flat tensor. One that is stored transposed is not copied as a whole for them."""
    if piece.dim() < 2:
        return piece[low:high]
    width = piece[0].numel()
    rows = piece[low // width : -(-high // width)].flatten()
    return rows[low % width : low % width + high - low]


def fresh_state(optimizer: Optimizer, parameter: Tensor, step: float) -> dict[str, Any]:
    """AdamW's for a parameter after `step` updates, the moments still to be filled in."""
    moments = {kind: torch.zeros_like(parameter, requires_grad=False) for kind in MOMENTS}
    return {"step": step_count(optimizer, parameter, step), **moments}


def step_count(optimizer: Optimizer, parameter: Tensor, step: float) -> Tensor | int:
    """As the optimizer has it: torch's a tensor, if fused on the parameter's device; DeepSpeed's a number."""
    fused = optimizer.param_groups[0].get("fused")
    torchs = type(optimizer).__module__.startswith("torch.")
    return torch.tensor(step, device=parameter.device if fused else "cpu") if torchs else int(step)
