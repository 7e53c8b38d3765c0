"""Tiny Shakespeare in GPT-2's tokens; the last tenth of its 1.1 million characters is for validation."""

import sys
import urllib.request
from argparse import ArgumentParser
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.errors import DataError
from data.prepare import Writer, read_plain, run
from data.tokenizer import tokenizer_from

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"


def download() -> str:
    try:
        with urllib.request.urlopen(URL, timeout=30) as response:
            return response.read().decode()
    except OSError as error:
        raise DataError(f"cannot download {URL} ({error}); download it elsewhere and pass --input FILE") from None


def main(parser: ArgumentParser, tokenizer_name: str) -> None:
    parser.add_argument("--input", type=Path, help="the text; default: input.txt beside the output, or download it")
    args = parser.parse_args()
    path = args.input or args.out / "input.txt"  # where nanoGPT's own script leaves it
    text = next(read_plain(path)) if args.input or path.exists() else download()
    tokenizer = tokenizer_from({"name": tokenizer_name, "characters": text})
    cut = int(len(text) * 0.9)
    with Writer(args.out, tokenizer, path.name if path.exists() else URL) as writer:
        writer.write("train", tokenizer.encode(text[:cut]), end=False)
        writer.write("val", tokenizer.encode(text[cut:]), end=False, text=text[cut:])


if __name__ == "__main__":
    run(lambda parser: main(parser, "gpt2"), __file__, __doc__)
