"""FineWeb-Edu: educational web pages (Penedo et al., arXiv:2406.17557), in samples of 10, 100 and 350 billion tokens.

python data/fineweb_edu/prepare.py                      10 billion tokens from the Hugging Face hub: 20 GB
python data/fineweb_edu/prepare.py --input FOLDER       from its parquet files
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data import front, web_text


def main() -> None:
    parser = web_text.parser(__file__, __doc__ or "")
    parser.add_argument("--sample", choices=("10BT", "100BT", "350BT"), default="10BT", help="which (default: 10BT)")
    args = parser.parse_args()
    web_text.prepare(args, "HuggingFaceFW/fineweb-edu", f"sample/{args.sample}", val_fraction=0.0005)


if __name__ == "__main__":
    front.run(main)
