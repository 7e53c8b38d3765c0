"""Documents of files, a few at a time: .txt and .md (one document a file), .jsonl and .parquet (one a row)."""

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path

from data.errors import DataError

PLAIN, ROWS = (".txt", ".md"), (".jsonl", ".parquet")
PIECE = 2**22  # bytes of plain text held at a time
# No tokenizer here makes a token across a single newline between other characters, so a text may be cut after one.
CUT = re.compile(r"\S\n(?=\S)")

Piece = tuple[str, bool]  # text of a document, or its next part; whether it ends here


def find(inputs: list[Path]) -> list[Path]:
    """The files meant, in sorted order; folders are searched."""
    found: list[Path] = []
    for path in inputs:
        if not path.exists():
            raise DataError(f"{path}: no such file or folder; name what is there")
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        known = [p for p in files if p.suffix in PLAIN + ROWS]
        if not known:
            raise DataError(f"{path}: holds no {', '.join(PLAIN + ROWS)}; rename or convert it")
        found += known
    return found


def pieces(path: Path, field: str) -> Iterator[Piece]:
    """DataError names the file, and the line or row, where the text cannot be read."""
    if path.suffix in PLAIN:
        yield from plain(path)
    else:
        for text in parquet(path, field) if path.suffix == ".parquet" else jsonl(path, field):
            yield text, True


def plain(path: Path) -> Iterator[Piece]:
    """A text of any size in parts whose tokens are those of the whole; DataError where it is not UTF-8."""
    decoder, rest = codecs.getincrementaldecoder("utf-8")(), ""
    with path.open("rb") as file:
        chunk = b"first"
        while chunk:
            chunk = file.read(PIECE)
            try:
                rest += decoder.decode(chunk, final=not chunk)  # a character that is cut off at the end is an error
            except UnicodeDecodeError as error:
                place = file.tell() - len(chunk) + error.start
                raise DataError(f"{path}: byte {place:,} is not UTF-8; convert it first (iconv -t utf-8)") from None
            cut = max((match.end() for match in CUT.finditer(rest)), default=0)
            if cut:
                yield rest[:cut], False
                rest = rest[cut:]
    yield rest, True


def jsonl(path: Path, field: str) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}:{number}: is not JSON ({error}); mend or remove the line") from None
            if not isinstance(row, dict) or not isinstance(row.get(field), str):
                keys = ", ".join(row) if isinstance(row, dict) else type(row).__name__
                raise DataError(f"{path}:{number}: has no text under {field!r}, only {keys}; set --field")
            yield row[field]


def parquet(path: Path, field: str) -> Iterator[str]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            names = file.schema_arrow.names
            if field not in names:
                raise DataError(f"{path}: has no column {field!r}, only {', '.join(names)}; set --field")
            for batch in file.iter_batches(batch_size=256, columns=[field], use_threads=False):
                yield from (text for text in batch.column(0).to_pylist() if text is not None)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as parquet ({str(error).splitlines()[0]}); fetch it again") from None
