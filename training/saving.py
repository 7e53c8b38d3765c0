"""How a checkpoint is written: at once, or in the background from a copy in memory; complete or not there."""

import io
import shutil
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from tqdm import tqdm

from training import files
from training.checkpoint import UNFINISHED, Checkpoints
from training.distributed import ALONE, Ranks
from training.errors import CheckpointError, UserError
from training.files import Sum


class Files:
    """What this rank writes of one checkpoint."""

    def __init__(self, folder: Path, later: bool):
        self.folder, self.later = folder, later
        self.sums: dict[str, Sum] = {}
        self.waiting: dict[str, io.BytesIO] = {}

    def write(self, name: str, state: Any) -> None:
        """By torch.save; later: into memory, from where `finish` writes it."""
        if self.later:
            self.waiting[name] = files.in_memory(state)
        else:
            self.sums[name] = files.write(self.folder / name, state)

    def finish(self) -> None:
        while self.waiting:
            name, content = self.waiting.popitem()
            self.sums[name] = files.put(self.folder / name, content)

    def add(self, paths: Iterable[Path]) -> None:
        """Files that somebody else wrote there, for this rank."""
        for path in paths:
            files.sync(path)
            self.sums[str(path.relative_to(self.folder))] = files.checksum(path)


class Saver:
    """later: a save takes from training only as long as copying this rank's part of the model state does.

    A thread of each rank then writes the copies. They agree by a process group of their own, as the ranks do otherwise:
    so a checkpoint is complete when all ranks have written theirs, or is not there.
    """

    def __init__(self, checkpoints: Checkpoints, ranks: Ranks = ALONE, later: bool = False):
        self.checkpoints, self.ranks, self.later = checkpoints, ranks, later
        several = later and ranks.world_size > 1
        self.aside = replace(ranks, control=dist.new_group(backend="gloo")) if several else ranks
        self.thread: threading.Thread | None = None
        self.failed: Exception | None = None

    @contextmanager
    def writing(self, about: dict[str, Any], best: bool) -> Iterator[Files]:
        """Every rank writes its files; when all have, they are the checkpoint of about["step"].

        Raises CheckpointError on every rank, with nothing saved before touched, where any rank could not write. In the
        background that is told, and training goes on: the next save is another try.
        """
        self.wait()
        unfinished = self.checkpoints.folder / f"{UNFINISHED}step_{about['step']:06d}"
        with self.explained(unfinished):
            self.begin(unfinished)
            written = Files(unfinished, self.later)
            with self.ranks.together():
                yield written
            if not self.later:
                self.finish(self.ranks, written, about, best)
        if self.later:
            self.thread = threading.Thread(target=self.in_background, args=(written, about, best), daemon=True)
            self.thread.start()

    def begin(self, unfinished: Path) -> None:
        with self.ranks.together():  # or what a killed run has left there would be taken for a part of this one
            if self.ranks.local_rank == 0:
                shutil.rmtree(unfinished, ignore_errors=True)
        with self.ranks.together():
            unfinished.mkdir(parents=True, exist_ok=True)

    def finish(self, ranks: Ranks, written: Files, about: dict[str, Any], best: bool) -> None:
        with ranks.together():
            written.finish()
        of_ranks = ranks.share(written.sums)
        with ranks.together():
            if ranks.main:
                sums = {name: found for of_rank in of_ranks for name, found in of_rank.items()}
                self.checkpoints.complete(written.folder, about, sums, best)

    def in_background(self, written: Files, about: dict[str, Any], best: bool) -> None:
        try:
            with self.explained(written.folder):
                self.finish(self.aside, written, about, best)
        except CheckpointError as error:
            self.failed = error
            if self.ranks.main:
                tqdm.write(f"{error}; training goes on, the next save is another try", file=sys.stderr)
        except Exception as error:  # of a rank that went away: told where this one waits for it
            self.failed = error

    @contextmanager
    def explained(self, unfinished: Path) -> Iterator[None]:
        """What could not be written is removed, and the message says what there is instead."""
        try:
            yield
        except UserError as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            whole = self.checkpoints.whole()
            kept = f"{whole[-1]} is whole, --init_from=resume goes on from it" if whole else "nothing was saved before"
            name = unfinished.name.removeprefix(UNFINISHED)
            raise CheckpointError(f"cannot save {name}: {error} ({kept})") from None

    def wait(self) -> None:
        """Until what is written in the background is there, or failed for what no other try can help."""
        self.join()
        failed, self.failed = self.failed, None
        if failed and not isinstance(failed, CheckpointError):
            raise failed

    def settle(self) -> None:
        """At the end of a run, which has no other try: raises CheckpointError where the last one failed."""
        self.join()
        if self.failed:
            raise self.failed

    def join(self) -> None:
        if self.thread:
            self.thread.join()
            self.thread = None
