"""tools.accept: the whole table at tiny size, and what happens to a stage that fails, takes too long, or is stopped."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.running import command, message, run, start_process, started_with
from tools import accept
from tools.accept import Acceptance, Stage
from training.errors import UserError

PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL, "text": True}


def test_every_stage_passes_on_the_cpu(copy, tmp_path):
    """In a copy of the repository, because the quickstart prepares its data set there."""
    line = command("-m", "tools.accept", device="cpu", write=tmp_path / "results", minutes=20)
    with start_process(line, cwd=copy, **PIPES) as process:
        output = process.communicate(timeout=900)[0]
    assert process.returncode == 0, output
    results = json.loads((tmp_path / "results" / "accept.json").read_text())
    stages, gpt2 = results["stages"], "config/train_gpt2.py"
    table = [*accept.correctness(False, Path("data"), gpt2), *accept.speed(False, gpt2, "")]
    assert list(stages) == [stage.name for stage in table] and len(table) > 40
    assert {result["status"] for result in stages.values()} == {"ok"}
