"""The source of the standard library of the Python that runs this, byte by byte: text that every machine has.

python data/python_stdlib/prepare.py
"""

import platform
import sys
import sysconfig
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data import front
from data.errors import DataError
from data.tokenizer import ByteTokenizer
from data.writer import Writer

LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def main() -> None:
    args = front.options(__file__, __doc__ or "").parse_args()
    library = Path(sysconfig.get_path("stdlib"))
    files = sorted(path.relative_to(library) for path in library.rglob("*.py"))
    files = [path for path in files if not LEFT_OUT.intersection(path.parts)]
    if not files:
        raise DataError(f"{library} holds no .py files: this Python has no source; run another Python")
    tokenizer = ByteTokenizer()
    with Writer(args.out, tokenizer, f"standard library of Python {platform.python_version()}") as writer:
        for path in files:
            text = (library / path).read_bytes()
            writer.sha256.update(text)
            # by a hash of its name, so that a file stays on its side whatever other files there are
            split = "val" if zlib.crc32(path.as_posix().encode()) % 20 == 0 else "train"
            writer.write(split, tokenizer.encode_bytes(text))
    print(writer.report())


if __name__ == "__main__":
    front.run(main)
