"""Your own text: .txt and .md files (a document each), .jsonl and .parquet (a document a row), or folders of them.

python data/text/prepare.py --input notes/ more.jsonl --tokenizer gpt2 --name mine
python train.py --dataset=mine ...

Where there are few plain files, the last part of each is for validation; else a part of the documents is, chosen by a
hash of their text.
"""

import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data import documents, front, shards
from data.errors import DataError
from data.hub import Source
from data.tokenizer import TIKTOKEN, tokenizer_from

FEW = 100  # plain files, up to which each is split


def main() -> None:
    parser = front.options(__file__, __doc__ or "")
    parser.set_defaults(out=None)
    parser.add_argument("--input", type=Path, nargs="+", required=True, help="files or folders")
    parser.add_argument("--name", required=True, help="of the data set, which is written to data/NAME (or --out)")
    parser.add_argument("--tokenizer", default="gpt2", help=f"byte, char, {', '.join(TIKTOKEN)} (default: gpt2)")
    parser.add_argument("--field", default="text", help="of .jsonl and .parquet that holds the text (default: text)")
    parser.add_argument("--val-fraction", type=float, default=0.1, help="of the text, for validation (default: 0.1)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one a core)")
    args = parser.parse_args()
    out = args.out or Path(__file__).resolve().parents[1] / args.name
    if not re.fullmatch(r"\w[\w.-]*", args.name):
        raise DataError(f"--name {args.name!r}: must be letters, digits, '.', '_' and '-'")
    if (out / "prepare.py").exists():
        raise DataError(f"--name {args.name!r}: is a data set with a prepare.py of its own; choose another")
    if not 0 < args.val_fraction < 1 or args.workers < 1:
        raise DataError(
            f"--val-fraction {args.val_fraction} --workers {args.workers}: must be between 0 and 1, and 1 or more"
        )
    files = documents.find(args.input)
    characters = alphabet(files, args.field) if args.tokenizer == "char" else ""
    tokenizer = tokenizer_from({"name": args.tokenizer, "characters": characters})
    by_position = len(files) <= FEW and all(path.suffix in documents.PLAIN for path in files)
    recipe = shards.Recipe(tokenizer.describe(), args.val_fraction, args.field, by_position)
    sources = [Source(str(path.resolve())) for path in files]
    shards.prepare(sources, out, recipe, args.workers, ", ".join(path.name for path in args.input))


def alphabet(files: list[Path], field: str) -> str:
    """All characters of the text."""
    found: set[str] = set()
    for path in files:
        for text, _ in documents.pieces(path, field):
            found.update(text)
    return "".join(sorted(found))


if __name__ == "__main__":
    front.run(main)
