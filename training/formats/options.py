"""How a target is to be written."""

from dataclasses import dataclass
from typing import Any

import torch

DTYPES = ("float32", "bfloat16", "float16")
VERIFY = ("logits", "tensors", "none")  # logits: and tensors


@dataclass(frozen=True)
class Options:
    dtype: str = "float32"  # of the weights; under ZeRO, that the model computes in: its fp32 weights are there as well
    stage: int = 3  # of ZeRO
    ranks: int = 1
    max_shard_size: float = 5e9  # bytes in a file of the Hugging Face folder
    vocab: int | None = None  # rows to keep of the embedding; None: all
    tokenizer: dict[str, Any] | None = None  # where the source does not say which: its describe()
    verify: str = "logits"  # one of VERIFY

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)
