"""Tests of this folder need a CUDA GPU: without one they are skipped, also with REQUIRE_ALL=yes, as CI has none."""

import pytest
import torch


def pytest_runtest_setup(item: pytest.Item) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
