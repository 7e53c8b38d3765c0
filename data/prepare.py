"""Shared by all data/*/prepare.py: options, error reporting, the writer of a data set, and tokenizing many files."""

import argparse
import contextlib
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data.dataset import SPLITS
from data.errors import DataError
from data.tokenizer import Tokenizer, copy_files

BATCH_DOCUMENTS = 2000  # tokenized at a time, by all threads together


def run(main: Callable[[argparse.ArgumentParser], None], script: str, description: str | None) -> None:
    """Run main with a parser that has --out. A problem that the user can fix ends with one message, and status 2."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(script).resolve().parent, help="folder to write to")
    try:
        main(parser)
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


class Writer(contextlib.AbstractContextManager["Writer"]):
    """Writes train.bin, val.bin and meta.json. An existing data set is replaced only when the `with` block ends."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, source: Any):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.tokenizer, self.source = folder, tokenizer, source
        self.dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
        self.files = {split: (folder / f".{split}.bin.unfinished").open("wb") for split in SPLITS}
        self.val_bytes = 0

    def write(self, split: str, ids: np.ndarray, end: bool = True, text: str = "") -> None:
        """Append the ids of a document and, if `end`, the id that ends it. text: of the ids, to count its bytes."""
        self.val_bytes += len(text.encode(errors="replace")) if split == "val" else 0
        if end and self.tokenizer.end_of_text is not None:
            ids = np.append(ids, self.tokenizer.end_of_text)
        size = self.tokenizer.vocab_size
        assert not len(ids) or 0 <= ids.min() <= ids.max() < size, f"ids to {ids.max()}, vocabulary of {size}"
        self.files[split].write(ids.astype(self.dtype).tobytes())

    def __exit__(self, error: type[BaseException] | None, *_: Any) -> None:
        try:
            if error is None:
                self.publish()
        finally:
            for file in self.files.values():
                Path(file.name).unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # a full disk refuses what is still buffered
                    file.close()

    def publish(self) -> None:
        """Rename the files. train.bin is the last: without it, the data set counts as not prepared."""
        tokens = {split: file.tell() // self.dtype.itemsize for split, file in self.files.items()}
        for split, file in self.files.items():
            if not tokens[split]:
                raise DataError(f"{self.source}: too little text, {split}.bin would be empty; add more text")
            file.flush()
            os.fsync(file.fileno())
        meta = {"tokenizer": self.tokenizer.description, "dtype": self.dtype.name, "source": self.source}
        meta |= {"vocab_size": self.tokenizer.vocab_size, **{f"{split}_tokens": tokens[split] for split in SPLITS}}
        meta |= {"val_bytes": self.val_bytes} if self.val_bytes else {}
        (self.folder / "train.bin").unlink(missing_ok=True)
        copy_files(self.tokenizer, self.folder)
        (self.folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
        for split in ("val", "train"):
            Path(self.files[split].name).replace(self.folder / f"{split}.bin")
        counts = ", ".join(f"{split} {count:,} tokens" for split, count in tokens.items())
        print(f"{self.folder}: {counts}, vocabulary {self.tokenizer.vocab_size:,}")


def tokenize_files(
    files: list[Path], out: Path, source: str, tokenizer: Tokenizer, val_fraction: float, field: str = "text"
) -> None:
    """Write the data set of all files to `out`.

    Up to 100 plain text files are split by position: the last part of each is for validation. field: column or key of
    the text in .parquet and .jsonl.
    """
    tokenizer.encode("")  # without a network, it fails here once, not in every thread
    by_position = len(files) <= 100 and all(READERS[file.suffix] is read_plain for file in files)
    with ThreadPoolExecutor() as pool, Writer(out, tokenizer, source) as writer:
        for file in tqdm(files, unit="file", disable=None):  # hidden unless stderr is a terminal
            documents = split_documents(file, val_fraction, field, by_position)
            while batch := list(islice(documents, BATCH_DOCUMENTS)):
                # Threads suffice: tiktoken and NumPy release the interpreter lock.
                encoded = pool.map(tokenizer.encode, (text for _, text in batch))
                for (split, text), ids in zip(batch, encoded, strict=True):
                    writer.write(split, ids, text=text)


def split_documents(file: Path, val_fraction: float, field: str, by_position: bool) -> Iterator[tuple[str, str]]:
    """Yield split and text of each document of a file that is not empty."""
    for text in filter(None, READERS[file.suffix](file, field)):
        if by_position:
            middle = int(len(text) * (1 - val_fraction))
            cut = text.find("\n", middle) + 1 or middle  # after a line, if there is a line break
            yield "train", text[:cut]
            yield "val", text[cut:]
        else:
            # The hash of its beginning puts a document on the same side, whatever the order or the files.
            number = zlib.crc32(text[:1000].encode(errors="replace")) / 2**32
            yield ("val" if number < val_fraction else "train"), text


def find_files(inputs: list[Path]) -> list[Path]:
    """The files among inputs and, sorted, those in folders among them. Raises DataError if an input has none."""
    files: list[Path] = []
    for path in inputs:
        candidates = sorted(path.rglob("*")) if path.is_dir() else [path]
        readable = [p for p in candidates if p.suffix in READERS and p.is_file()]  # no pipe, which would be waited for
        if not readable:
            raise DataError(f"{path}: no {', '.join(READERS)} file there; rename or convert the text")
        files += readable
    return files


def read_plain(path: Path, _: str = "") -> Iterator[str]:
    """Yield the whole file."""
    data = path.read_bytes()
    try:
        yield data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: is not UTF-8; convert the file (iconv -t utf-8)") from None


def read_jsonl(path: Path, field: str) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                str.encode(text := json.loads(line)[field])  # fails for what is no text, or half of a surrogate pair
            except (ValueError, LookupError, TypeError, RecursionError):
                problem = f"must be JSON with text under {field!r}; fix the line or set --field"
                raise DataError(f"{path}:{number}: {problem}") from None
            yield text


def read_parquet(path: Path, field: str) -> Iterator[str]:
    """Yield each row; empty (null) rows are skipped."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            names = file.schema_arrow.names
            if field not in names:
                raise DataError(f"{path}: no column {field!r}, only {', '.join(names)}; set --field")
            for batch in file.iter_batches(batch_size=256, columns=[field], use_threads=False):
                texts, kind = batch.column(0).drop_null().to_pylist(), batch.column(0).type
                if not all(isinstance(text, str) for text in texts):
                    raise DataError(f"{path}: column {field!r} is of type {kind}, must be string; set --field")
                yield from texts
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not readable as parquet ({str(error).splitlines()[0]}); download it again") from None


# Each yields the texts of a file's documents. DataError names the file and the line or column.
READERS: dict[str, Callable[[Path, str], Iterator[str]]]
READERS = {".txt": read_plain, ".md": read_plain, ".jsonl": read_jsonl, ".parquet": read_parquet}
