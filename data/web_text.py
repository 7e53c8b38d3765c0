"""Web text for pre-training: a large data set of the Hugging Face hub, in GPT-2's tokens."""

import argparse
import os
from pathlib import Path

from data import documents, hub, shards
from data.errors import DataError
from data.front import options


def parser(script: str, about: str) -> argparse.ArgumentParser:
    found = options(script, about)
    found.add_argument("--input", type=Path, nargs="+", help="parquet files or folders of them; else from the hub")
    found.add_argument("--files", type=int, default=0, help="take only the first so many parquet files; 0: all")
    found.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one a core)")
    return found


def prepare(args: argparse.Namespace, repository: str, folder: str, val_fraction: float) -> None:
    """val_fraction: how much of the documents is for validation."""
    if args.files < 0 or args.workers < 1:
        raise DataError(f"--files {args.files} --workers {args.workers}: must be 0 or more, and 1 or more")
    if args.input:
        sources = [hub.Source(str(path)) for path in documents.find(args.input)]
    else:
        sources = hub.parquet_files(repository, folder)
    recipe = shards.Recipe({"name": "gpt2"}, val_fraction)
    shards.prepare(sources[: args.files or None], args.out, recipe, args.workers, f"{repository}, {folder}")
