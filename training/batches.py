"""Batches: each one a pure function of (seed, step, micro_step, rank). Evaluation has its own fixed batches.

A generator keyed by (seed, step) draws the sequence starts of the global batch, and each rank takes its part. So the
global batches are the same under every strategy, on any number of ranks, and in a resumed run.
"""

import os
import zlib

import numpy as np
import torch
from torch import Tensor

from data.dataset import open_dataset
from data.errors import DataError
from training.config import ROOT, TrainConfig
from training.distributed import Ranks

STREAMS = {"training": 0, "train": 1, "val": 2}  # the last two: evaluation of that split
PAGE_BYTES = 4096


class Batches:
    """Raises DataError if the data set is missing, damaged, or too short for block_size."""

    def __init__(self, cfg: TrainConfig, ranks: Ranks):
        self.cfg, self.ranks = cfg, ranks
        self.dataset = open_dataset(ROOT / "data" / cfg.dataset)
        self.micro_steps = cfg.gradient_accumulation_steps // ranks.data_size
        self.tokens_per_step = cfg.gradient_accumulation_steps * cfg.batch_size * cfg.block_size
        self.files = {split: os.open(self.dataset.path(split), os.O_RDONLY) for split in ("train", "val")}
        for split, tokens in self.dataset.tokens.items():
            if tokens <= cfg.block_size:
                rule = f"too few for block_size = {cfg.block_size}, which needs one more; lower it or prepare more text"
                raise DataError(f"{self.dataset.path(split)} has {tokens:,} tokens: {rule}")
            # A first look at 16 places, before anything is built, finds most files of another tokenizer.
            self.read(split, np.linspace(0, tokens - cfg.block_size, 16, endpoint=False, dtype=int))

    def describe(self) -> dict[str, str]:
        """Size and content of the data set, as all ranks must have it: a checksum of the first and last pages."""
        about = {"tokenizer": str(self.dataset.tokenizer.description)}
        for split, file in self.files.items():
            size = os.fstat(file).st_size
            pages = os.pread(file, PAGE_BYTES, 0) + os.pread(file, PAGE_BYTES, max(0, size - PAGE_BYTES))
            about[f"{split}.bin"] = f"{size:,} bytes, CRC-32 of both ends {zlib.crc32(pages):08x}"
        return about

    def train(self, step: int, micro_step: int) -> tuple[Tensor, Tensor]:
        """This rank's tokens and targets, each (batch_size, block_size) int64, on its device.

        Under sequence parallelism, it has block_size / sequence_parallel positions of each sequence.
        """
        starts = self.draw("training", step, self.cfg.gradient_accumulation_steps)
        return self.read("train", starts[self.micro_batch(micro_step)])

    def evaluation(self, split: str, index: int) -> tuple[Tensor, Tensor]:
        """Batch number `index` of a split: the same at every evaluation, under every strategy."""
        return self.read(split, self.draw(split, index, 1)[0])

    def micro_batch(self, micro_step: int) -> int:
        """Which of the step's gradient_accumulation_steps micro-batches this rank takes at micro_step."""
        return micro_step * self.ranks.data_size + self.ranks.data_rank

    def dropout_seed(self, step: int, micro_step: int) -> int:
        """Dropout depends on the micro-batch alone: not on the number of ranks, and no RNG state has to be saved."""
        return zlib.crc32(f"{self.cfg.seed}/{step}/{self.micro_batch(micro_step)}".encode())

    def draw(self, stream: str, number: int, micro_batches: int) -> np.ndarray:
        """Sequence starts, (micro_batches, batch_size)."""
        split = "val" if stream == "val" else "train"
        generator = np.random.default_rng([self.cfg.seed, STREAMS[stream], number])
        starts = self.dataset.tokens[split] - self.cfg.block_size
        return generator.integers(starts, size=(micro_batches, self.cfg.batch_size))

    def read(self, split: str, starts: np.ndarray) -> tuple[Tensor, Tensor]:
        """Plain reads, served by the page cache; a memory map would count every page ever touched as this process's."""
        dtype, length = self.dataset.dtype, self.cfg.block_size + 1
        size = length * dtype.itemsize
        rows = b"".join(os.pread(self.files[split], size, int(start) * dtype.itemsize) for start in starts)
        if len(rows) != size * len(starts):
            raise DataError(f"{self.dataset.path(split)} became shorter while it was being read; prepare it again")
        ids = np.frombuffer(rows, dtype).reshape(len(starts), length)
        if (largest := int(ids.max())) >= self.dataset.vocab_size:
            rule = f"outside its vocabulary of {self.dataset.vocab_size}: it is damaged, or of another tokenizer"
            raise DataError(f"{self.dataset.path(split)} contains id {largest}, {rule}; prepare it again")
        width = self.cfg.block_size // self.ranks.layout.sequence
        start = self.ranks.sequence_rank * width
        tokens = torch.from_numpy(ids[:, start : start + width + 1].astype(np.int64))
        on_gpu = self.ranks.device.type == "cuda"
        tokens = (tokens.pin_memory() if on_gpu else tokens).to(self.ranks.device, non_blocking=on_gpu)
        return tokens[:, :-1], tokens[:, 1:]
