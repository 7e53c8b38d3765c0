"""OpenWebText: 8 million documents, 9 billion of GPT-2's tokens; 54 GB of text, 18 GB of tokens.

python data/openwebtext/prepare.py                      from the Hugging Face hub
python data/openwebtext/prepare.py --input FOLDER       from its parquet files
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data import front, web_text


def main() -> None:
    args = web_text.parser(__file__, __doc__ or "").parse_args()
    web_text.prepare(args, "Skylion007/openwebtext", "plain_text", val_fraction=0.0005)


if __name__ == "__main__":
    front.run(main)
