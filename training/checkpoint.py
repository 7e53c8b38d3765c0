"""Checkpoints: complete or not there. What is in the files is the train script's; when they count is decided here.

out_dir/checkpoints/step_000500/    the script's files, and checkpoint.json with their sizes
out_dir/latest, out_dir/best        text: step_000500
"""

import json
import os
import pickle
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from training.distributed import ALONE, Ranks
from training.errors import CheckpointError, UserError

FORMAT = 1


class Checkpoints:
    def __init__(self, out_dir: str, ranks: Ranks = ALONE, keep: int = 2):
        self.out_dir, self.keep, self.ranks = Path(out_dir), keep, ranks
        self.folder = self.out_dir / "checkpoints"

    @contextmanager
    def writing(self, about: dict[str, Any], best: bool) -> Iterator[Path]:
        """Every rank writes its files into the folder given; when all have, they are the checkpoint of about["step"].

        Raises UserError on every rank, with nothing saved before touched, where any rank could not write.
        """
        name = f"step_{about['step']:06d}"
        unfinished = self.folder / f"unfinished_{name}"
        try:
            with self.ranks.together():  # or what a killed run has left there would be taken for a part of this one
                if self.ranks.local_rank == 0:
                    shutil.rmtree(unfinished, ignore_errors=True)
            with self.ranks.together():
                unfinished.mkdir(parents=True, exist_ok=True)
            with self.ranks.together():
                yield unfinished
            with self.ranks.together():
                if self.ranks.main:
                    self.complete(unfinished, name, {"format": FORMAT, **about}, best)
        except UserError as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            whole = self.whole()
            kept = f"{whole[-1]} is whole, --init_from=resume goes on from it" if whole else "nothing was saved before"
            raise CheckpointError(f"cannot save {name}: {error} ({kept})") from None

    def complete(self, unfinished: Path, name: str, about: dict[str, Any], best: bool) -> None:
        """The order is what makes a kill harmless: files on disk, then the name, then `latest`."""
        files = [p for p in unfinished.rglob("*") if p.is_file()]
        for path in files:
            sync(path)
        about["files"] = {str(p.relative_to(unfinished)): p.stat().st_size for p in sorted(files)}
        write_text(unfinished / "checkpoint.json", json.dumps(about, indent=1))
        final = self.folder / name
        if damage(final):  # a whole one of the same step stays: replacing it would leave a moment without any
            shutil.rmtree(final, ignore_errors=True)
            unfinished.rename(final)
        sync(self.folder)
        write_text(self.out_dir / "latest", name + "\n")
        if best:
            write_text(self.out_dir / "best", name + "\n")
        self.prune()

    def prune(self) -> None:
        """Keep the newest few and the best; also clear away what a killed run left unfinished."""
        best = self.out_dir / "best"
        keep = {best.read_text().strip()} if best.exists() else set()
        keep |= {path.name for path in self.whole()[-self.keep :]}
        finished = self.finished()
        for path in self.folder.iterdir():
            if path.name not in keep:
                if path in finished:  # at once, or a kill would leave one that looks damaged
                    path = path.rename(path.with_name(f"removed_{path.name}"))
                shutil.rmtree(path, ignore_errors=True)

    def whole(self) -> list[Path]:
        """The undamaged checkpoints, oldest first."""
        return [p for p in self.finished() if not damage(p)]

    def finished(self) -> list[Path]:
        return sorted(self.folder.glob("step_*"), key=lambda p: int(p.name.removeprefix("step_")))

    def newest(self) -> tuple[Path, dict[str, Any]]:
        """The newest checkpoint and its checkpoint.json; CheckpointError where there is none or it is damaged."""
        if not (finished := self.finished()):
            raise CheckpointError(
                f"init_from = 'resume': {self.out_dir} holds no checkpoint; "
                "start with --init_from=scratch, or name the run's --out_dir"
            )
        path = finished[-1]
        if broken := damage(path):
            whole = self.whole()
            offer = f"{whole[-1]} is whole and is taken then" if whole else "there is no other: start from scratch"
            raise CheckpointError(f"{path} is damaged: {broken}; remove that folder ({offer})")
        return path, read_about(path)


def read_about(path: Path) -> dict[str, Any]:
    """checkpoint.json: what the checkpoint is of."""
    return json.loads((path / "checkpoint.json").read_text())


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, by the sizes of its files."""
    try:
        about = read_about(path)
        if about["format"] != FORMAT:
            return f"checkpoint.json has format {about['format']}, this code reads {FORMAT}"
        for name, size in about["files"].items():
            found = (path / name).stat().st_size if (path / name).exists() else None
            if found != size:
                return f"{name} is missing" if found is None else f"{name} has {found:,} of {size:,} bytes"
    except (OSError, ValueError, KeyError) as error:
        return f"checkpoint.json cannot be read ({type(error).__name__}: {error})"
    return None


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


def write(path: Path, state: Any) -> None:
    """torch.save, with a full disk told as the OSError that it is."""
    with path.open("wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # torch's zip writer, when the file below it refused bytes
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def read(path: Path) -> Any:
    """What `write` wrote, on the CPU and mapped, not copied; no code in a file is run."""
    with path.open("rb") as file:
        old = file.read(2) == b"\x80\x02"  # of torch before 1.6: no zip file, and not to be mapped
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=not old)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:  # EINVAL: seeking in what was cut off
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        code = asked and f"it asks for {asked[1]}, and whatever code that runs; only tensors and plain data are read"
        raise CheckpointError(f"{path} cannot be read: {code or str(error).splitlines()[0]}") from None


@torch.no_grad()
def fill(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Copy weights into the parameters of the same names; they must be exactly those."""
    parameters = dict(model.named_parameters())
    assert parameters.keys() == weights.keys(), f"other parameters: {sorted(parameters.keys() ^ weights.keys())}"
    for name, parameter in parameters.items():
        parameter.copy_(weights[name])
