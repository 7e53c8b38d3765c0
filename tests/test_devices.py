"""The table of GPUs, matmul peaks by CUDA's names, and the matmul timer."""

import pytest
import torch

from training import devices
from training.gpus import DEVICES, find_device

NAMES = {
    "NVIDIA H100 80GB HBM3": "H100",
    "NVIDIA H100 PCIe": "H100 PCIe",
    "NVIDIA H200": "H200",
    "NVIDIA A100-SXM4-40GB": "A100 40GB",
    "NVIDIA A100 80GB PCIe": "A100",
    "Tesla V100-SXM2-16GB": "V100 16GB",
    "Tesla V100-PCIE-16GB": "V100 PCIE",
    "NVIDIA RTX 6000 Ada Generation": "RTX 6000 Ada",
    "NVIDIA A10G": "A10G",
    "NVIDIA A100-SXM4-40GB MIG 1g.5gb": None,
    "NVIDIA RTX A1000": None,
    "NVIDIA GeForce RTX 4090 Laptop GPU": None,
    "NVIDIA GeForce RTX 4090 D": None,
    "NVIDIA GeForce RTX 3090 Ti": None,
    "NVIDIA GeForce GT 710": None,
    "NVIDIA GB200": None,
}


@pytest.fixture
def gpu(monkeypatch):
    """Pretend that CUDA reports a GPU of this name; restores the TF32 setting."""
    before = torch.get_float32_matmul_precision()

    def name_it(name: str) -> torch.device:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: "V100" not in name)
        return torch.device("cuda")

    yield name_it
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("name", NAMES)
def test_cudas_name_leads_to_a_row(name):
    assert find_device(name) == NAMES[name]


def test_no_row_is_hidden_by_one_before_it():
    assert [find_device(key) for key in DEVICES] == list(DEVICES)


@pytest.mark.parametrize("key", DEVICES)
def test_rows_are_plausible(key):
    row = DEVICES[key]
    assert row.half > row.tf32 >= row.fp32 > 5 and row.memory >= 16 and row.bandwidth >= 300 and 16 <= row.link <= 900


@pytest.mark.parametrize(
    "precision, h100, v100", [("highest", 67e12, 15.7e12), ("high", 494e12, 15.7e12), ("medium", 494e12, 15.7e12)]
)
def test_the_fp32_peak_is_that_of_tf32_only_where_tf32_is_on(gpu, precision, h100, v100):
    torch.set_float32_matmul_precision(precision)
    for name, fp32, half in (("NVIDIA H100 80GB HBM3", h100, 989e12), ("Tesla V100-SXM2-16GB", v100, 125e12)):
        device = gpu(name)
        assert devices.peak_flops(device, torch.float32) == fp32
        assert devices.peak_flops(device, torch.float16) == half


def test_no_peak_where_it_is_unknown(gpu):
    assert devices.peak_flops(torch.device("cpu"), torch.float32) is None
    assert devices.peak_flops(gpu("NVIDIA GeForce RTX 3090 Ti"), torch.float16) is None
    assert devices.peak_flops(gpu("Tesla V100-SXM2-16GB"), torch.bfloat16) is None, "it emulates bfloat16"


def test_a_matmul_is_timed():
    small, large = (devices.time_matmul(torch.device("cpu"), torch.float32, size, 3) for size in (64, 512))
    assert 0 < small < large
