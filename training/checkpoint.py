"""Checkpoints: complete or absent. The train scripts decide what is in the files; this module decides what counts.

out_dir/checkpoints/step_000500/    the train script's files, and checkpoint.json with their sizes and checksums
out_dir/latest, out_dir/best        text: step_000500
"""

import copy
import json
import os
import re
import shutil
import sys
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_leaves
from torch.utils.serialization import config as torch_save_config
from tqdm import tqdm

from model import GPTConfig
from training.distributed import SINGLE_PROCESS, Ranks
from training.errors import CheckpointError, UserError, count

FORMAT = 1
METADATA, OWN_CHECKSUM = "checkpoint.json", "own_crc32"
UNFINISHED = "unfinished_"
OWN_NAME = re.compile(r"(unfinished_|removed_)?step_\d+")  # anything else in the folder is left alone
Checksum = tuple[int, str]  # a file's size in bytes, and its CRC-32 in hexadecimal


class Checkpoints:
    def __init__(self, out_dir: str, ranks: Ranks = SINGLE_PROCESS, keep: int = 2):
        self.out_dir, self.keep, self.ranks = Path(out_dir), keep, ranks
        self.folder = self.out_dir / "checkpoints"

    def finish(self, unfinished: Path, metadata: dict[str, Any], checksums: dict[str, Checksum], best: bool) -> None:
        """Turn a folder of synced files into a checkpoint, on rank 0. A kill is harmless: `latest` names it last."""
        name = unfinished.name.removeprefix(UNFINISHED)
        sizes, crcs = ({name: checksums[name][part] for name in sorted(checksums)} for part in (0, 1))
        metadata = {"format": FORMAT, **metadata, "files": sizes, "crc32": crcs}
        metadata[OWN_CHECKSUM] = metadata_checksum(metadata)
        write_text(unfinished / METADATA, json.dumps(metadata, indent=1))
        final = self.folder / name
        # An intact checkpoint of this step stays: replacing it would leave a moment without one.
        if find_damage(final) or find_corruption(final):
            shutil.rmtree(final, ignore_errors=True)
            unfinished.rename(final)
        sync(self.folder)
        write_text(self.out_dir / "latest", name + "\n")
        if best:
            write_text(self.out_dir / "best", name + "\n")
        self.prune()

    def prune(self) -> None:
        """Keep the newest few and the best; remove what a killed run left unfinished."""
        best = self.out_dir / "best"
        keep = {best.read_text(errors="replace").strip()} if best.exists() else set()
        keep |= {path.name for path in self.intact()[-self.keep :]}
        for path in self.folder.iterdir():
            if OWN_NAME.fullmatch(path.name) and path.name not in keep:
                if path.name.startswith("step_"):  # rename first: a kill must not leave a damaged checkpoint
                    path = path.rename(path.with_name(f"removed_{path.name}"))
                shutil.rmtree(path, ignore_errors=True)

    def intact(self) -> list[Path]:
        """Checkpoints whose files have the right sizes, oldest first."""
        return [path for path in self.finished() if not find_damage(path)]

    def finished(self) -> list[Path]:
        """All checkpoints, oldest first. Raises OSError or CheckpointError if the folder cannot be read."""
        if self.folder.is_symlink() and not self.folder.exists():
            raise CheckpointError(f"{self.folder} is a link to a folder that does not exist; mount it")
        paths = self.folder.iterdir() if self.folder.exists() else ()
        finished = [path for path in paths if re.fullmatch(r"step_\d+", path.name)]
        return sorted(finished, key=lambda path: int(path.name.removeprefix("step_")))

    def usable(self, fall_back: bool) -> tuple[Path, dict[str, Any]] | None:
        """The newest checkpoint, every byte of which was checked, and its metadata; None: there is none. A collective.

        fall_back: if it is damaged, take the one before. Raises UserError if none can be used, or if ranks differ.
        """
        with self.ranks.together():
            finished = self.finished()
            damages = {path: find_damage(path) for path in finished}
            metadata = {path: read_metadata(path) for path in finished if not damages[path]}
        self.ranks.agree({p.name: damages[p] or f"CRC-32 {metadata[p].get(OWN_CHECKSUM)}" for p in finished})
        for path in reversed(finished):
            damage = damages[path] or next(filter(None, self.ranks.share(find_corruption(path, self.ranks))), None)
            if not damage:
                return path, metadata[path]
            if not fall_back:
                fix = "remove that folder to resume from the one before, if there is one"
                raise CheckpointError(f"{path} is damaged: {damage}; {fix}")
            if self.ranks.main:
                print(f"warning: {path} is damaged: {damage}; trying the one before", file=sys.stderr, flush=True)
        if finished:
            fix = "restore one from a copy, or start again in another --out_dir; nothing was changed"
            raise CheckpointError(f"{self.folder}: none of its {count(len(finished), 'checkpoint')} can be used; {fix}")
        return None

    def newest(self, fall_back: bool = False) -> tuple[Path, dict[str, Any]]:
        """As `usable`; raises CheckpointError if there is none."""
        if newest := self.usable(fall_back):
            return newest
        fix = "start with --init_from=scratch, or set --out_dir to the run's folder"
        raise CheckpointError(f"init_from = 'resume': {self.out_dir} has no checkpoint; {fix}")


def read_metadata(path: Path) -> dict[str, Any]:
    """A checkpoint's checkpoint.json: step, model, tokenizer, strategy, files."""
    return json.loads((path / METADATA).read_text())


def metadata_checksum(metadata: dict[str, Any]) -> str:
    text = json.dumps({key: value for key, value in metadata.items() if key != OWN_CHECKSUM}, sort_keys=True)
    return f"{zlib.crc32(text.encode()):08x}"


def find_damage(path: Path) -> str | None:
    """What is wrong with a checkpoint by its checkpoint.json and the sizes of its files; None if nothing is."""
    try:
        metadata = read_metadata(path)
        if metadata.get("format") != FORMAT:
            return f"{METADATA} has format {metadata.get('format')}, this code reads {FORMAT}"
        if OWN_CHECKSUM in metadata and metadata[OWN_CHECKSUM] != metadata_checksum(metadata):
            return f"{METADATA} does not match its own checksum"
        for name, size in metadata["files"].items():
            if not (path / name).exists():
                return f"{name} is missing"
            if (actual := (path / name).stat().st_size) != size:
                return f"{name} has {actual:,} of {size:,} bytes"
        GPTConfig(**metadata["model"])
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        return f"{METADATA} cannot be read ({type(error).__name__}: {error})"
    return None


def find_corruption(path: Path, ranks: Ranks = SINGLE_PROCESS) -> str | None:
    """What is wrong with the bytes of this rank's share of the files. Early versions wrote no checksums."""
    metadata = read_metadata(path)
    mine = list(metadata.get("crc32", {}).items())[ranks.rank :: ranks.world_size]
    for name, crc in ranks.progress(mine, "verifying"):
        if (actual := checksum(path / name)[1]) != crc:
            return f"{name} does not match its checksum (CRC-32 {actual}, written as {crc})"
    return None


class CheckpointWriter:
    """This rank's files of one checkpoint. A train script names them with `write`, and `finish` writes them."""

    def __init__(self, folder: Path, background: bool):
        self.folder, self.background = folder, background
        self.checksums: dict[str, Checksum] = {}
        self.pending: dict[str, Any] = {}

    def write(self, name: str, state: Any) -> None:
        self.pending[name] = copy_to_host(state) if self.background else state

    def add(self, path: Path) -> None:
        """Include a file of the folder: sync it to disk, and note its size and checksum."""
        sync(path)
        self.checksums[str(path.relative_to(self.folder))] = checksum(path)

    def finish(self) -> None:
        """Write with torch.save. Raises OSError where the disk refuses, such as when it is full."""
        while self.pending:
            name, state = self.pending.popitem()
            with (self.folder / name).open("wb") as file:
                save(state, file, crc32=False)
            self.add(self.folder / name)


class Saver:
    """Saves checkpoints: at once, or by a thread per rank from a copy in host memory, while training continues."""

    def __init__(self, checkpoints: Checkpoints, background: bool = False):
        self.checkpoints, self.ranks, self.background = checkpoints, checkpoints.ranks, background
        self.writing_ranks = self.ranks  # the threads have a process group of their own
        if background and self.ranks.world_size > 1:
            self.writing_ranks = replace(self.ranks, control=dist.new_group(backend="gloo"))
        self.thread: threading.Thread | None = None
        self.error: Exception | None = None

    @contextmanager
    def writing(self, metadata: dict[str, Any], best: bool) -> Iterator[CheckpointWriter]:
        """Every rank names its files; once all are written, they are the checkpoint of metadata["step"].

        Raises CheckpointError on every rank if any could not write. In the background, it is only printed (see `wait`).
        """
        self.wait()
        unfinished = self.checkpoints.folder / f"{UNFINISHED}step_{metadata['step']:06d}"
        with self.failure_explained(unfinished):
            with self.ranks.together():
                if self.ranks.local_rank == 0:  # files of a killed run must not become part of this checkpoint
                    shutil.rmtree(unfinished, ignore_errors=True)
                    unfinished.mkdir(parents=True, exist_ok=True)
            writer = CheckpointWriter(unfinished, self.background)
            with self.ranks.together():
                yield writer
        if self.background:
            self.thread = threading.Thread(target=self.finish_in_background, args=(writer, metadata, best), daemon=True)
            self.thread.start()
        else:
            self.finish(writer, metadata, best)

    def finish(self, writer: CheckpointWriter, metadata: dict[str, Any], best: bool) -> None:
        ranks = self.writing_ranks
        with self.failure_explained(writer.folder):
            with ranks.together():
                writer.finish()
            merged = {name: value for checksums in ranks.share(writer.checksums) for name, value in checksums.items()}
            with ranks.together():
                if ranks.main:
                    self.checkpoints.finish(writer.folder, metadata, merged, best)

    def finish_in_background(self, writer: CheckpointWriter, metadata: dict[str, Any], best: bool) -> None:
        try:
            self.finish(writer, metadata, best)
        except Exception as error:  # `wait` raises it in the main thread, unless another save can help
            self.error = error
            if self.ranks.main and isinstance(error, CheckpointError):
                tqdm.write(f"{error}; training continues, the next save tries again", file=sys.stderr)

    @contextmanager
    def failure_explained(self, unfinished: Path) -> Iterator[None]:
        """Remove what could not be finished; the message says which checkpoint is left."""
        try:
            yield
        except UserError as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            intact = self.checkpoints.intact()
            left = f"--init_from=resume continues from {intact[-1]}" if intact else "no earlier checkpoint exists"
            raise CheckpointError(f"cannot save {unfinished.name.removeprefix(UNFINISHED)}: {error} ({left})") from None

    def wait(self, last: bool = False) -> None:
        """Wait for the background write. Raises its error if this was the last save, or if another one cannot help."""
        if self.thread:
            self.thread.join()
        error, self.error, self.thread = self.error, None, None
        if error and (last or not isinstance(error, CheckpointError)):
            raise error


@torch.no_grad()
def copy_to_host(state: Any) -> Any:
    """A deep copy with all tensors in host memory; pinned, where they come from a GPU: ten times as fast."""
    copies, by_id = dict[Any, torch.Tensor](), {}
    for tensor in (leaf for leaf in tree_leaves(state) if isinstance(leaf, torch.Tensor)):
        memory = tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype  # a tied weight is copied once
        if memory not in copies:
            host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda, requires_grad=False)
            copies[memory] = host.copy_(tensor, non_blocking=True)
        by_id[id(tensor)] = copies[memory]
    if torch.cuda.is_initialized():
        torch.cuda.current_stream().synchronize()
    return copy.deepcopy(state, by_id)


def save(state: Any, file: Any, crc32: bool) -> None:
    """torch.save; crc32: whether to add zip checksums, which take as long as all else. checkpoint.json has its own."""
    try:
        with torch_save_config.patch("save.compute_crc32", crc32):  # type: ignore[attr-defined]
            torch.save(state, file)
    except RuntimeError as error:  # its zip writer hides the file's OSError, such as a full disk
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def checksum(path: Path) -> Checksum:
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(2**24):
            crc = zlib.crc32(chunk, crc)
        return file.tell(), f"{crc:08x}"


def write_text(path: Path, text: str) -> None:
    """Replace a file atomically."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(text)
    sync(unfinished)
    unfinished.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """fsync, so that a rename never reaches the disk before the content it names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
