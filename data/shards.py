"""Much text to tokens: several processes, one file each at a time, and a second start goes on where a first ended.

The tokens of a finished file wait in OUT/shards until all are there; then they become train.bin and val.bin.
"""

import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import sys
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data import documents
from data.errors import DataError
from data.hub import Source
from data.tokenizer import tokenizer_from
from data.writer import SPLITS, Writer, packed

progress: Any = None  # in a worker: a shared counter


@dataclass(frozen=True)
class Recipe:
    """What the tokens of a file depend on, besides the file."""

    tokenizer: dict[str, Any]
    val_fraction: float
    field: str = "text"
    by_position: bool = False  # the last part of each document is for validation, rather than some whole documents


def prepare(sources: list[Source], out: Path, recipe: Recipe, workers: int, about: str) -> None:
    """Write the data set of all sources to `out`. Raises DataError at the first file that cannot be read."""
    folder, tokenizer = out / "shards", tokenizer_from(recipe.tokenizer)
    tokenizer.encode("")  # a BPE file is fetched here, once
    folder.mkdir(parents=True, exist_ok=True)
    todo = [s for s in sources if finished(folder, s, recipe) is None]
    if len(todo) < len(sources):
        print(f"{len(sources) - len(todo)} of {len(sources)} files were tokenized before", file=sys.stderr)
    tokenize_all(todo, folder, recipe, workers)
    with Writer(out, tokenizer, about) as writer:
        for source in sources:
            done = finished(folder, source, recipe)
            assert done is not None, f"{source} is not tokenized"
            writer.sha256.update(bytes.fromhex(done["sha256"]))
            for split in SPLITS:
                writer.copy(split, shard(folder, source, split))
    shutil.rmtree(folder)
    print(writer.report())


def shard(folder: Path, source: Source, kind: str) -> Path:
    return folder / f"{zlib.crc32(source.name.encode()):08x}_{Path(source.name).stem}.{kind}"


def finished(folder: Path, source: Source, recipe: Recipe) -> dict[str, Any] | None:
    """The note of a tokenized file, or None where it is missing or of another file or recipe."""
    note = shard(folder, source, "json")
    done = json.loads(note.read_text()) if note.exists() else {}
    return done if done.get("of") == json.loads(json.dumps(identity(source, recipe))) else None


def identity(source: Source, recipe: Recipe) -> dict[str, Any]:
    stat = None if source.repository else Path(source.name).stat()
    return {**asdict(source), **asdict(recipe), "size": stat and stat.st_size, "time": stat and stat.st_mtime_ns}


def tokenize_all(sources: list[Source], folder: Path, recipe: Recipe, workers: int) -> None:
    context = multiprocessing.get_context("spawn")
    counter = context.Value("Q", 0)
    with (
        tqdm(unit="B", unit_scale=True, desc="text", disable=None if sources else True) as bar,
        ProcessPoolExecutor(max(1, min(workers, len(sources))), context, share, (counter,)) as pool,
    ):
        todo: set[Future] = {pool.submit(tokenize, source, folder, recipe) for source in sources}
        try:
            while todo:
                done, todo = wait(todo, timeout=0.5, return_when=FIRST_COMPLETED)
                bar.set_postfix_str(f"{len(sources) - len(todo)}/{len(sources)} files")
                bar.update(counter.value - bar.n)
                for future in done:
                    future.result()
        except BrokenProcessPool:
            raise DataError(f"a worker was killed, perhaps for its memory; try --workers {workers // 2 or 1}") from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def share(counter: Any) -> None:
    """At the start of a worker: where it counts the bytes of text that it has seen; and it ends with its parent."""
    global progress
    progress = counter
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """Even kill -9 of the parent leaves no worker that waits for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent, "only a worker ends with its parent"
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def tokenize(source: Source, folder: Path, recipe: Recipe) -> None:
    """One file, in a worker: its tokens, and last of all the note that they are complete."""
    tokenizer, path, sha256 = tokenizer_from(recipe.tokenizer), source.fetch(folder), hashlib.sha256()
    files = {split: shard(folder, source, split).open("wb") for split in SPLITS}
    for split, text, end in assigned(path, recipe):
        text_bytes = text.encode(errors="surrogatepass")
        sha256.update(text_bytes)
        files[split].write(packed(tokenizer.encode(text), tokenizer, end))
        with progress.get_lock():
            progress.value += len(text_bytes)
    for file in files.values():
        file.close()
    if source.repository:
        path.unlink()
    note = shard(folder, source, "json")
    unfinished = note.with_suffix(".unfinished")
    unfinished.write_text(json.dumps({"of": identity(source, recipe), "sha256": sha256.hexdigest()}))
    unfinished.replace(note)


def assigned(path: Path, recipe: Recipe) -> Iterator[tuple[str, str, bool]]:
    """(split, text, whether a document ends) of a file."""
    if recipe.by_position:
        yield from by_position(path, recipe)
        return
    split = ""
    for text, end in documents.pieces(path, recipe.field):
        # by a hash of how it begins: the same whatever the order, the files or the number of workers
        number = zlib.crc32(text[:1000].encode(errors="replace")) / 2**32
        split = split or ("val" if number < recipe.val_fraction else "train")
        yield split, text, end
        split = "" if end else split


def by_position(path: Path, recipe: Recipe) -> Iterator[tuple[str, str, bool]]:
    """For a few long documents: the first part of each trains, the rest, from a whole line on where it can, is val."""
    boundary, seen = path.stat().st_size * (1 - recipe.val_fraction), 0
    for text, end in documents.pieces(path, recipe.field):
        size = len(text.encode())
        if seen < boundary <= seen + size:
            share_of_text = int(len(text) * (boundary - seen) / size)
            cut = text.find("\n", share_of_text) + 1 or share_of_text
            yield "train", text[:cut], True
            yield "val", text[cut:], end
        else:
            yield ("train" if seen < boundary else "val"), text, end
        seen += size
