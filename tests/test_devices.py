"""The table of GPUs, matmul peaks by CUDA's names, and the matmul timer."""

import shutil
from datetime import timedelta

import pytest
import torch

from training import devices, distributed
from training.distributed import Ranks
from training.errors import ConfigError, NodeError
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
    "NVIDIA GB200": "GB200",
    "NVIDIA B300 SXM6 AC": "B300",
    "NVIDIA H20": "H20",
    "NVIDIA RTX A6000": "A6000",
    "NVIDIA GeForce RTX 5090": "RTX 5090",
    "NVIDIA GeForce RTX 5090 Laptop GPU": None,
    "NVIDIA B400": None,
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


def test_a_gpu_that_torch_cannot_use_is_an_error_and_no_training_on_the_cpu(monkeypatch, tmp_path):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert distributed.pick_device("auto", 0, 2) == torch.device("cpu"), "this machine has no GPU"
    monkeypatch.setattr(distributed, "NVIDIA_DEVICE", tmp_path)  # it exists
    for cuda in (None, "13.0"):  # a torch without CUDA; a driver that is too old
        monkeypatch.setattr(torch.version, "cuda", cuda)
        with pytest.raises(ConfigError) as raised:
            distributed.pick_device("auto", 0, 1)
        fix = f"install a driver and a torch of one CUDA version (torch has {cuda}), or set --device=cpu"
        assert str(raised.value) == f"device = 'auto': torch cannot use the NVIDIA GPU of this machine; {fix}"
    assert distributed.pick_device("cpu", 0, 1) == torch.device("cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert distributed.pick_device("auto", 0, 1) == torch.device("cpu"), "the user hides the GPUs"


def test_too_little_shared_memory_is_named_where_nccl_fails(monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("NCCL error in: init.cpp:1, unhandled system error")

    ranks = Ranks(rank=0, local_rank=0, world_size=1, device=torch.device("cuda", 0))
    monkeypatch.setattr(torch.distributed, "init_process_group", fail)
    for size, told in ((2**26, "/dev/shm has 64 MiB, too little for NCCL; docker run --shm-size=1g"), (2**30, "reach")):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, size=size: shutil._ntuple_diskusage(size, 0, size))
        with pytest.raises(NodeError) as raised:
            distributed.join(ranks, "auto", timedelta(seconds=1), False)
        assert "NCCL error in: init.cpp:1" in str(raised.value) and told in str(raised.value)
