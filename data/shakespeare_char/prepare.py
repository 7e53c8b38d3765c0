"""Tiny Shakespeare, character by character.

python data/shakespeare_char/prepare.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data import front, tiny_shakespeare

if __name__ == "__main__":
    front.run(lambda: tiny_shakespeare.prepare(__file__, __doc__ or "", "char"))
