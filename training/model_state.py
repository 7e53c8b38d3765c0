"""The model state in a checkpoint, in fp32, whichever strategy wrote it; read without DeepSpeed.

Files are memory-mapped, and a rank reads only the parts it needs, so it never holds more than its own share.
"""

import fnmatch
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from data.dataset import Dataset
from model import GPT, GPTConfig
from training.checkpoint import METADATA, read_metadata
from training.config import TrainConfig
from training.distributed import Ranks
from training.errors import CheckpointError, count
from training.fsdp import WEIGHT, local_part
from training.init import InitState

TIED = "lm_head.weight"  # the same parameter as the embedding
MOMENTUM_BUFFER = "momentum_buffer"  # Muon's state of a parameter


@dataclass
class SavedState:
    """step: the optimizer's step count, None if it keeps none; scaler: state of torch's GradScaler (fp16)."""

    folder: Path
    shapes: dict[str, torch.Size]  # of every parameter; tied parameters once
    pieces: dict[tuple[str, str], list[Any]]  # (parameter, kind) -> consecutive pieces of the flat tensor
    step: float | None = None
    scaler: dict[str, Any] = field(default_factory=dict)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of optimizer state, such as exp_avg and exp_avg_sq; () where there are weights only."""
        return tuple(dict.fromkeys(kind for _, kind in self.pieces if kind != WEIGHT))

    def kinds_of(self, name: str) -> tuple[str, ...]:
        """Those of one parameter: Muon has one kind for some parameters, and AdamW two for the others."""
        return tuple(kind for kind in self.kinds if (name, kind) in self.pieces)

    def part(self, name: str, kind: str, start: int, numel: int) -> Tensor:
        """Elements start ... start + numel of the flat parameter or optimizer state: fp32, on the CPU."""
        parts, offset = [], 0
        for piece in self.pieces[name, kind]:
            low, high = max(start - offset, 0), min(start + numel - offset, piece.numel())
            if low < high:
                parts.append(piece.flatten()[low:high])
            offset += piece.numel()
        return (parts[0] if len(parts) == 1 else torch.cat(parts or [torch.empty(0)])).float()

    def whole(self, name: str, kind: str = WEIGHT) -> Tensor:
        return self.part(name, kind, 0, self.shapes[name].numel()).view(self.shapes[name])

    @torch.no_grad()
    def into(self, model: nn.Module, optimizer: Optimizer | None = None) -> None:
        """Fill a model, and its optimizer if given: completely, or this rank's shards under FSDP2."""
        parameters = dict(model.named_parameters())
        different = parameters.keys() ^ self.shapes.keys()
        assert not different, f"different parameters: {different}"
        for name, parameter in parameters.items():
            tensors = {WEIGHT: parameter}
            if optimizer:
                kinds = self.kinds_of(name)
                state = optimizer.state[parameter] = fresh_state(optimizer, parameter, kinds, self.step)
                tensors |= {kind: state[kind] for kind in kinds}
            for kind, tensor in tensors.items():
                target, start = local_part(tensor)
                target.copy_(self.part(name, kind, start, target.numel()).view_as(target))


def fresh_state(optimizer: Optimizer, parameter: Tensor, kinds: tuple[str, ...], step: float | None) -> dict[str, Any]:
    """The optimizer's state of a parameter after `step` updates, zero until it is filled."""
    state: dict[str, Any] = {kind: torch.zeros_like(parameter, requires_grad=False) for kind in kinds}
    if step is not None and MOMENTUM_BUFFER not in kinds:
        # torch's optimizers keep a tensor (fused: on the parameter's device), DeepSpeed's an int
        inner, fused = getattr(optimizer, "aux_optimizer", optimizer), optimizer.param_groups[0].get("fused")
        is_torch = isinstance(inner, torch.optim.AdamW) or type(inner).__module__.startswith("torch.")
        state["step"] = torch.tensor(step, device=parameter.device if fused else "cpu") if is_torch else int(step)
    return state


def moments(state: dict[str, Any]) -> dict[str, Tensor]:
    """The entries of a parameter's optimizer state that have one element per parameter; a step count does not."""
    return {kind: value for kind, value in state.items() if isinstance(value, Tensor) and value.dim() > 0}


def open_state(folder: Path, metadata: dict[str, Any]) -> SavedState:
    """Open a checkpoint of any strategy; metadata: its checkpoint.json. Raises CheckpointError if they do not match."""
    if metadata["strategy"] == "fsdp":
        saved = from_shards(folder, metadata)
    elif metadata["strategy"].startswith("zero"):
        from training.deepspeed_layout import open_partitions

        saved = open_partitions(folder, metadata)
    else:
        weights, state = (read_torch_file(find_file(folder, metadata, f"{n}.pt")) for n in ("model", "optimizer"))
        saved = from_whole(folder, weights, state["optimizer"], state["scaler"])
    return check_parameters(saved, GPTConfig(**metadata["model"]))


def init_from_checkpoint(cfg: TrainConfig, folder: Path, metadata: dict[str, Any], dataset: Dataset) -> InitState:
    """Raises CheckpointError where the checkpoint does not fit the data set or the settings."""
    saved, current, ids = metadata["tokenizer"], dataset.tokenizer.description, metadata["vocab_size"]
    if saved != current:
        raise CheckpointError(
            f"{folder} was trained with tokenizer {saved['name']!r} ({ids} ids), which is not that of "
            f"dataset = {cfg.dataset!r} ({current['name']!r}, {dataset.vocab_size} ids); use the run's own data set"
        )
    if (optimizer := metadata.get("optimizer", cfg.optimizer)) != cfg.optimizer:
        rule = f"holds the state of {optimizer}, but optimizer = {cfg.optimizer!r}"
        raise CheckpointError(f"{folder} {rule}; resume with --optimizer={optimizer}")
    model = GPTConfig(**metadata["model"])
    model = replace(model, dropout=cfg.dropout, activation_checkpointing=cfg.activation_checkpointing)
    # a run that started from pretrained weights has their shape, whatever the settings say
    wanted, keys = cfg.model_config(dataset.vocab_size), ["block_size"]
    if metadata["init_from"] == "scratch":
        keys = sorted(asdict(model).keys() & vars(cfg).keys())
    if different := [k for k in keys if getattr(wanted, k) != getattr(model, k)]:
        fixes = [f"--{k}={getattr(model, k)} (not {getattr(wanted, k)})" for k in different]
        raise CheckpointError(f"{folder} is of another model; resume it with {', '.join(fixes)}")
    kept: dict[str, Any] = {key: metadata[key] for key in ("init_from", "step", "best_val_loss")}
    return InitState(model, checkpoint=folder, evaluated=metadata.get("evaluated", True), **kept)


def find_file(folder: Path, metadata: dict[str, Any], pattern: str) -> Path:
    """The first file of a checkpoint that matches, of those that its checkpoint.json lists: others are never read."""
    if not (names := fnmatch.filter(metadata["files"], pattern)):
        raise CheckpointError(f"{folder}: {METADATA} lists no {pattern}; use another checkpoint")
    return folder / min(names)


def read_torch_file(path: Path, mmap: bool = True) -> Any:
    """Read a torch.save file to the CPU; runs no code in it. Raises CheckpointError."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # unpickling arbitrary bytes raises anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if unsafe := re.search(r"GLOBAL ([\w.]+)", str(error)):
            reason = f"it contains {unsafe[1]}; only tensors and plain data are loaded"
        raise CheckpointError(f"{path} cannot be read: {reason}") from None


@contextmanager
def reading(folder: Path, ranks: Ranks) -> Iterator[SavedState]:
    """Open a complete checkpoint to resume from; prints the elapsed time."""
    metadata, since = read_metadata(folder), time.perf_counter()
    yield open_state(folder, metadata)
    if ranks.main:
        source = f"{metadata['strategy']} on {count(metadata['world_size'], 'rank')}"
        print(f"read {folder.name} ({source}) in {time.perf_counter() - since:.1f} s", flush=True)


def from_whole(
    folder: Path, weights: dict[str, Tensor], optimizer: dict, scaler: dict, order: list[str] | None = None
) -> SavedState:
    """Parameters and optimizer states that are stored whole.

    optimizer: states by parameter name, or a state_dict, which numbers the parameters. order: their names by number;
    None: matrices first, then vectors, as nanoGPT and earlier versions have them.
    """
    shapes = {name: weight.shape for name, weight in weights.items()}
    pieces = {(name, WEIGHT): [weight.detach().flatten()] for name, weight in weights.items()}
    states = optimizer
    if "param_groups" in optimizer:
        order = order or sorted(shapes, key=lambda name: len(shapes[name]) < 2)
        states = {order[number]: state for number, state in sorted(optimizer["state"].items())}
    for name, state in states.items():
        pieces |= {(name, kind): [tensor.flatten()] for kind, tensor in moments(state).items()}
    return SavedState(folder, shapes, pieces, find_step(states), scaler)


def from_shards(folder: Path, metadata: dict[str, Any]) -> SavedState:
    """FSDP2's files: each rank has some rows of every parameter and optimizer state (training/fsdp.py)."""
    shards = [read_torch_file(folder / name) for name in sorted(metadata["files"])]
    first = shards[0]
    shapes = {name: torch.Size(shape) for name, shape in first["shapes"].items()}
    pieces = {
        (name, kind): [shard[kind][name].detach().flatten() for shard in shards]
        for kind in first.keys() - {"shapes", "step", "scaler"}
        for name in first[kind]
    }
    return SavedState(folder, shapes, pieces, first["step"], first["scaler"])


def find_step(states: dict[Any, dict[str, Any]]) -> float | None:
    return max((float(state["step"]) for state in states.values() if "step" in state), default=None)


def model_shapes(config: GPTConfig) -> dict[str, torch.Size]:
    """Return the shape of every parameter, in the model's order; tied ones once."""
    with torch.device("meta"):
        return {name: parameter.shape for name, parameter in GPT(config).named_parameters()}


def check_parameters(saved: SavedState, config: GPTConfig) -> SavedState:
    """Return saved with its parameters in the model's order. Raises CheckpointError if they do not match config."""
    try:
        expected = model_shapes(config)
    except (TypeError, AssertionError, RuntimeError, ZeroDivisionError) as error:
        raise CheckpointError(f"{saved.folder}: its model cannot be built ({error}): {config}") from None
    found = {name: tuple(shape) for name, shape in saved.shapes.items()}
    required = {name: tuple(shape) for name, shape in expected.items()}
    problems = [
        f"{name} is {found.get(name, 'missing')}, the model's config says {required.get(name, 'no such parameter')}"
        for name in {**required, **found}
        if found.get(name) != required.get(name)
    ] or [
        f"{name} has {expected[name].numel():,} elements; its stored {kind} has fewer"
        for (name, kind), pieces in saved.pieces.items()
        if sum(piece.numel() for piece in pieces) < expected[name].numel()  # more is padding
    ]
    if problems:
        shown = [*problems[:5], "..."] if len(problems) > 5 else problems
        raise CheckpointError("\n  ".join([f"{saved.folder}: problems in its parameters: {len(problems)}", *shown]))
    return replace(saved, shapes=expected)
