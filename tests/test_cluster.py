"""Hosts made for tests are removed, even when a test is killed."""

import signal
import subprocess
import sys

from tests import cluster
from tests.running import ROOT


def test_the_hosts_of_a_killed_test_are_removed_by_the_next(tmp_path):
    cluster.require()
    for name in ("killed", "next"):
        (tmp_path / name).mkdir()
    make = f"with Cluster(Path({str(tmp_path / 'killed')!r}), 2) as made: print(made.tag, flush=True); time.sleep(100)"
    code = f"import time\nfrom pathlib import Path\nfrom tests.cluster import Cluster\n{make}"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout, "it was asked for"
    tag = process.stdout.readline().strip()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert f"{tag}-1" in cluster.run("ip", "netns", "list") and tag in cluster.run("ip", "link")
    with cluster.Cluster(tmp_path / "next", 1):
        assert tag not in cluster.run("ip", "netns", "list") + cluster.run("ip", "link")
