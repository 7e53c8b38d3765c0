"""tools.benchmark over links of several speeds, between two hosts that are network namespaces of one machine.

python -m tests.cluster.links results/zero_links
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from tests.cluster import Cluster
from tests.running import ROOT

RATES = ("10gbit", "1gbit", "100mbit")
MODEL = ["--n_layer=4", "--n_head=4", "--n_embd=256", "--block_size=128", "--batch_size=4"]
SETTINGS = ["config/train_debug.py", *MODEL, "--gradient_accumulation_steps=2", "--learning_rate=1e-3", "--min_lr=1e-4"]


def main(target: Path) -> None:
    with tempfile.TemporaryDirectory() as folder, Cluster(Path(folder), 2) as cluster:
        for rate in RATES:
            for host in cluster.hosts:
                host.limit(rate)
            line = [
                sys.executable,
                "-m",
                "tools.benchmark",
                f"--hostfile={cluster.hostfile(1)}",
                f"--ssh={cluster.ssh}",
            ]
            line += [
                "--strategies=ddp,zero1,zero2,zero3",
                "--rounds=2",
                "--steps=10",
                "--speed",
                f"--write={target / rate}",
            ]
            subprocess.run([*line, *SETTINGS], cwd=ROOT, check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
