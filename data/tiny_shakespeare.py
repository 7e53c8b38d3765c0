"""Tiny Shakespeare: one text of 1.1 million characters, the last tenth of which is for validation."""

from pathlib import Path

from data.documents import plain
from data.errors import DataError
from data.front import download, options
from data.tokenizer import tokenizer_from
from data.writer import Writer

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"


def prepare(script: str, about: str, tokenizer_name: str) -> None:
    parser = options(script, about)
    parser.add_argument("--input", type=Path, help=f"the text; else it is downloaded from {URL}")
    args = parser.parse_args()
    path = args.input or download(URL, args.out / "input.txt")
    text = "".join(piece for piece, _ in plain(path))
    if not text:
        raise DataError(f"{path} is empty; give a text")
    tokenizer = tokenizer_from({"name": tokenizer_name, "characters": text})
    cut = int(len(text) * 0.9)
    with Writer(args.out, tokenizer, str(args.input.name if args.input else URL)) as writer:
        writer.sha256.update(text.encode())
        # one text, so there is no end of text between documents
        writer.write("train", tokenizer.encode(text[:cut]), end=False)
        writer.write("val", tokenizer.encode(text[cut:]), end=False)
    print(writer.report())
