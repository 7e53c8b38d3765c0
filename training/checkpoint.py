"""Checkpoints: complete or not there. What is in the files is the train script's; which of them count is decided here.

out_dir/checkpoints/step_000500/    the script's files, and checkpoint.json with their sizes and checksums
out_dir/latest, out_dir/best        text: step_000500
"""

import json
import shutil
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from training import files
from training.distributed import ALONE, Ranks
from training.errors import CheckpointError
from training.files import Sum

FORMAT = 1
ABOUT, OWN = "checkpoint.json", "own_crc32"
UNFINISHED = "unfinished_"


class Checkpoints:
    def __init__(self, out_dir: str, ranks: Ranks = ALONE, keep: int = 2):
        self.out_dir, self.keep, self.ranks = Path(out_dir), keep, ranks
        self.folder = self.out_dir / "checkpoints"

    def complete(self, unfinished: Path, about: dict[str, Any], sums: dict[str, Sum], best: bool) -> None:
        """Make a checkpoint of the files in a folder; sums: of those that are on the disk already. By the main rank.

        The order is what makes a kill harmless: files on disk, then the name, then `latest`.
        """
        for path in sorted(p for p in unfinished.rglob("*") if p.is_file()):
            if (name := str(path.relative_to(unfinished))) not in sums:
                files.sync(path)
                sums[name] = files.checksum(path)
        name = unfinished.name.removeprefix(UNFINISHED)
        files.write_text(unfinished / ABOUT, signed({"format": FORMAT, **about, **listed(sums)}))
        final = self.folder / name
        if damage(final):  # a whole one of the same step stays: replacing it would leave a moment without any
            shutil.rmtree(final, ignore_errors=True)
            unfinished.rename(final)
        files.sync(self.folder)
        files.write_text(self.out_dir / "latest", name + "\n")
        if best:
            files.write_text(self.out_dir / "best", name + "\n")
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
            raise self.refused(path, broken)
        return path, read_about(path)

    def verify(self, path: Path) -> None:
        """Every byte of a checkpoint, shared out over the ranks. Raises CheckpointError on one that finds others."""
        if broken := flipped(path, self.ranks):
            raise self.refused(path, broken)

    def refused(self, path: Path, broken: str) -> CheckpointError:
        whole = [other for other in self.whole() if other != path]
        offer = f"{whole[-1]} is whole and is taken then" if whole else "there is no other: start from scratch"
        return CheckpointError(f"{path} is damaged: {broken}; remove that folder ({offer})")


def read_about(path: Path) -> dict[str, Any]:
    """checkpoint.json: what the checkpoint is of."""
    return json.loads((path / ABOUT).read_text())


def signed(about: dict[str, Any]) -> str:
    """The text of a checkpoint.json, with a checksum of its own."""
    return json.dumps({**about, OWN: own_checksum(about)}, indent=1)


def own_checksum(about: dict[str, Any]) -> str:
    text = json.dumps({key: value for key, value in about.items() if key != OWN}, sort_keys=True)
    return f"{zlib.crc32(text.encode()):08x}"


def listed(sums: dict[str, Sum]) -> dict[str, Any]:
    """What a checkpoint.json says of the files beside it."""
    ordered = sorted(sums.items())
    return {"files": {name: size for name, (size, _) in ordered}, "crc32": {name: crc for name, (_, crc) in ordered}}


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, by its checkpoint.json and the sizes of its files."""
    try:
        about = read_about(path)
        if about["format"] != FORMAT:
            return f"{ABOUT} has format {about['format']}, this code reads {FORMAT}"
        if OWN in about and about[OWN] != own_checksum(about):
            return f"{ABOUT} is not what was written"
        for name, size in about["files"].items():
            found = (path / name).stat().st_size if (path / name).exists() else None
            if found != size:
                return f"{name} is missing" if found is None else f"{name} has {found:,} of {size:,} bytes"
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        return f"{ABOUT} cannot be read ({type(error).__name__}: {error})"
    return None


def check(path: Path) -> None:
    """A folder by itself, every byte of it. Raises CheckpointError."""
    if broken := damage(path) or flipped(path):
        raise CheckpointError(f"{path} is damaged: {broken}; take another one")


def flipped(path: Path, ranks: Ranks = ALONE) -> str | None:
    """What is wrong with the bytes of an undamaged one, in this rank's share of the files; older ones have no sums."""
    about = read_about(path)
    mine = list(about.get("crc32", {}).items())[ranks.rank :: ranks.world_size]
    total = sum(about["files"][name] for name, _ in mine)
    quiet = None if ranks.main else True  # None: where nobody looks
    with tqdm(total=total, desc="checking", unit="B", unit_scale=True, disable=quiet, leave=False) as bar:
        for name, crc in mine:
            if (found := files.checksum(path / name, bar.update)[1]) != crc:
                return f"{name} is not what was written (its CRC-32 is {found}, was {crc})"
    return None


@torch.no_grad()
def fill(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Copy weights into the parameters of the same names; they must be exactly those."""
    parameters = dict(model.named_parameters())
    assert parameters.keys() == weights.keys(), f"other parameters: {sorted(parameters.keys() ^ weights.keys())}"
    for name, parameter in parameters.items():
        parameter.copy_(weights[name])
