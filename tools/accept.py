"""Check that this code is right and fast on this machine, against the CPU and fixed targets (docs/gpu.md).

    python -m tools.accept --peer=../nanoGPT
    python -m tools.accept --only=fp32,resume,zero2_124m
    python -m tools.accept --device=cpu

Ctrl-C keeps the results so far. Exit status: 0 if all stages passed, 1 if one failed or was not run.
"""

from functools import partial

from tests.acceptance import main
from training.distributed import run

if __name__ == "__main__":
    run(partial(main, __doc__ or ""))
