"""Tiny Shakespeare, one token per character; the last tenth is for validation."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.prepare import run
from data.shakespeare.prepare import main

if __name__ == "__main__":
    run(lambda parser: main(parser, "char"), __file__, __doc__)
