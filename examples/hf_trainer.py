"""Train a GPT-2 of `transformers` with Hugging Face's Trainer and our deepspeed_configs/*.json, unchanged.

    python -m launch.ranks 8 examples/hf_trainer.py --deepspeed=deepspeed_configs/zero2_config.json --learning_rate=1e-3
    deepspeed --num_gpus=8 examples/hf_trainer.py --deepspeed=deepspeed_configs/zero3_config.json --model=gpt2-xl \
        --dataset=shakespeare --block_size=1024 --bf16 --per_device_train_batch_size=1 --gradient_accumulation_steps=4

Without --deepspeed it trains with DDP. Losses differ slightly from ours: with an optimizer in the JSON the Trainer also
decays biases and norms, and under ZeRO-3 transformers initializes a new model in another order.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.dataset import DATA_FOLDER, Dataset, open_dataset
from training import deepspeed_engine, distributed
from training.errors import UserError


@dataclass
class Settings:
    dataset: str = "shakespeare_char"  # folder under data/, or a path, with train.bin and val.bin
    block_size: int = 64  # tokens per sequence
    model: str = ""  # name on the hub, or a folder written by tools.convert --to=hf; empty: a small new GPT-2


def read_arguments(device: torch.device) -> tuple[Settings, Any]:
    """Return Settings and TrainingArguments."""
    from transformers import HfArgumentParser, TrainingArguments

    parser = HfArgumentParser([Settings, TrainingArguments], description=__doc__)  # type: ignore[list-item]
    parser.set_defaults(use_cpu=device.type == "cpu", output_dir="out-hf", max_steps=100, logging_steps=10)
    parser.set_defaults(disable_tqdm=True, log_level_replica="error", report_to="none", save_strategy="no")
    return parser.parse_args_into_dataclasses()  # type: ignore[return-value]


def build(settings: Settings, dataset: Dataset) -> Any:
    """Return the model, built after TrainingArguments, so that ZeRO-3 partitions each weight as it is created."""
    from transformers import AutoModelForCausalLM, GPT2Config

    if not settings.model:
        new: dict[str, Any] = {"n_positions": settings.block_size, "n_layer": 4, "n_head": 4, "n_embd": 128}
        new |= dict.fromkeys(("bos_token_id", "eos_token_id"), dataset.tokenizer.end_of_text)
        return AutoModelForCausalLM.from_config(GPT2Config(vocab_size=dataset.vocab_size, **new))
    model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32)
    positions, ids = model.config.n_positions, model.config.vocab_size
    if settings.block_size > positions or dataset.vocab_size > ids:
        raise UserError(f"model = {settings.model!r}: lower block_size to {positions}, the data set's ids to {ids}")
    return model


def collate(sequences: list[np.ndarray]) -> dict[str, torch.Tensor]:
    ids = torch.from_numpy(np.stack(sequences).astype(np.int64))
    return {"input_ids": ids, "labels": ids}  # the model shifts the labels


def main() -> None:
    with distributed.start("auto", "auto", process_group=True) as ranks:
        settings, arguments = read_arguments(ranks.device)
        from transformers import Trainer

        with ranks.together():  # one message, not one per rank
            dataset = open_dataset(DATA_FOLDER / settings.dataset)
        size, tokens = settings.block_size, dataset.tokens["train"]
        if arguments.deepspeed:
            import deepspeed

            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # see train_deepspeed.py
            deepspeed.init_distributed(verbose=False)  # else ZeRO-3 on CPU ranks sees a single rank
            deepspeed_engine.load(deepspeed, arguments.hf_deepspeed_config.config, ranks)  # one rank compiles
        torch.manual_seed(arguments.seed)
        model = build(settings, dataset)
        sequences: Any = np.memmap(dataset.path("train"), dataset.dtype, "r", shape=(tokens // size, size))
        trainer = Trainer(model, arguments, collate, sequences)
        trainer.train()
        trainer.save_model()  # on every rank: under ZeRO-3 it gathers the weights
        trainer.save_state()


if __name__ == "__main__":
    distributed.run(main)
