"""Your own text: .txt and .md files (one document each), .jsonl and .parquet (one document per row), or folders.

python data/text/prepare.py --input notes/ more.jsonl --tokenizer gpt2 --name mine
python train.py --dataset=mine ...

Validation text: of up to 100 plain files, the last part of each; otherwise documents chosen by a hash of their text.
"""

import re
import sys
from argparse import ArgumentParser
from itertools import chain
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.dataset import DATA_FOLDER
from data.errors import DataError
from data.hf_tokenizer import from_model
from data.prepare import READERS, find_files, run, tokenize_files
from data.tokenizer import TIKTOKEN, Tokenizer, tokenizer_from


def main(parser: ArgumentParser) -> None:
    parser.set_defaults(out=None)
    parser.add_argument("--input", type=Path, nargs="+", required=True, help="files or folders")
    parser.add_argument("--name", required=True, help="name of the data set, written to data/NAME unless --out is set")
    parser.add_argument("--tokenizer", default="gpt2", help=f"byte, char, {', '.join(TIKTOKEN)}, or a model's folder")
    parser.add_argument("--field", default="text", help="key or column of the text in .jsonl and .parquet")
    parser.add_argument("--val-fraction", type=float, default=0.1, help="part of the text that is for validation")
    args = parser.parse_args()
    out = args.out or DATA_FOLDER / args.name
    if not re.fullmatch(r"\w[\w.-]*", args.name) or (out / "prepare.py").exists():
        raise DataError(f"--name {args.name!r}: must be letters, digits, '.', '_', '-'; no data set with a prepare.py")
    if not 0 < args.val_fraction < 1:
        raise DataError(f"--val-fraction {args.val_fraction}: must be between 0 and 1")
    files = [file.resolve() for file in find_files(args.input)]
    texts = chain.from_iterable(READERS[file.suffix](file, args.field) for file in files)
    characters = "".join(set(chain.from_iterable(texts))) if args.tokenizer == "char" else ""
    if (folder := Path(args.tokenizer)).is_dir():
        tokenizer: Tokenizer = from_model(folder)
    else:
        tokenizer = tokenizer_from({"name": args.tokenizer, "characters": characters})
    tokenize_files(files, out, ", ".join(path.name for path in args.input), tokenizer, args.val_fraction, args.field)


if __name__ == "__main__":
    run(main, __file__, __doc__)
