"""FineWeb-Edu: educational web pages (Penedo et al., arXiv:2406.17557), in samples of 10, 100 and 350 billion tokens.
10 billion take up to 70 GB of disk, and 20 GB when it is done. With --folder sample/100BT: 100 billion.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.openwebtext.prepare import main
from data.prepare import run

if __name__ == "__main__":
    run(lambda parser: main(parser, "HuggingFaceFW/fineweb-edu", "sample/10BT"), __file__, __doc__)
