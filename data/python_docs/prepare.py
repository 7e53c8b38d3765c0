"""Prose that every Python has: the language reference and the docstrings of the standard library, byte by byte."""

import re
import sys
import sysconfig
import zlib
from argparse import ArgumentParser
from pathlib import Path
from pydoc_data.topics import topics

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.prepare import Writer, run
from data.tokenizer import ByteTokenizer

EXCLUDED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
MARKUP = str.maketrans("‘’—–", "''--", '“”"*`')  # noqa: RUF001  # quotation marks to ASCII; without markup
PROSE = re.compile(r"[A-Z][A-Za-z_ ,.;:'()/?!-]{59,}\.")  # no code, list, table or title


def main(parser: ArgumentParser) -> None:
    library = Path(sysconfig.get_path("stdlib"))
    files = (p for p in sorted(library.rglob("*.py")) if not EXCLUDED.intersection(p.relative_to(library).parts))
    docstrings = (text for file in files for text in re.findall(r'(?s)"""(.*?)"""', file.read_text("utf-8", "replace")))
    blocks = (block for text in (*topics.values(), *docstrings) for block in re.split(r"\n\s*\n", text))
    paragraphs = dict.fromkeys(" ".join(block.translate(MARKUP).split()) for block in blocks)  # each one once
    source = f"documentation of Python {sys.version.split()[0]}"
    with Writer(parser.parse_args().out, ByteTokenizer(), source) as writer:
        for paragraph in filter(PROSE.fullmatch, paragraphs):
            # The hash keeps a paragraph in the same split in every version of Python.
            split = "val" if zlib.crc32(paragraph.encode()) % 20 == 0 else "train"
            text = paragraph + "\n\n"
            writer.write(split, writer.tokenizer.encode(text), end=False, text=text)


if __name__ == "__main__":
    run(main, __file__, __doc__)
