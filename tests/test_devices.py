"""Peaks of GPUs by their names."""

import pytest
import torch

from training import devices

UNKNOWN = [None, None, None]


def test_no_name_is_hidden_by_one_before_it():
    names = list(devices.PEAK_TFLOPS)
    for i, longer in enumerate(names):
        assert not any(before in longer.split() for before in names[:i]), f"{longer} is never found"


@pytest.mark.parametrize(
    "name, peaks",
    [
        ("NVIDIA H100 80GB HBM3", [989, 989, 494]),
        ("NVIDIA H100 PCIe", [756, 756, 378]),
        ("NVIDIA H200", [989, 989, 494]),
        ("NVIDIA A100-SXM4-40GB", [312, 312, 156]),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", UNKNOWN),
        ("NVIDIA RTX A1000", UNKNOWN),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", UNKNOWN),
        ("NVIDIA GeForce RTX 3090 Ti", UNKNOWN),
        ("NVIDIA GeForce GT 710", UNKNOWN),
        ("NVIDIA GB200", UNKNOWN),
        ("Tesla V100-SXM2-16GB", [None, 125, 15.7]),
        ("Tesla V100-PCIE-16GB", [None, 112, 14]),
    ],
)
def test_peaks_in_bf16_fp16_and_fp32(monkeypatch, name, peaks):
    """Of dense matmuls; and none is guessed."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: "V100" not in name)
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    found = [devices.peak_flops(torch.device("cuda"), dtype) for dtype in dtypes]
    assert found == [peak and pytest.approx(peak * 1e12) for peak in peaks]


def test_a_cpu_has_no_peak():
    assert devices.peak_flops(torch.device("cpu"), torch.float32) is None
