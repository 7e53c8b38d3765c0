"""Train a GPT-2 of `transformers` with Hugging Face's Trainer and our deepspeed_configs/*.json, unchanged.

    python -m launch.ranks 8 tests/hf_trainer.py --deepspeed=deepspeed_configs/zero2_config.json --learning_rate=1e-3
    deepspeed --num_gpus=8 tests/hf_trainer.py --deepspeed=deepspeed_configs/zero3_config.json --model=gpt2-xl \
        --dataset=shakespeare --block_size=1024 --bf16 --per_device_train_batch_size=1 --gradient_accumulation_steps=4

Without --deepspeed it trains with DDP. Losses differ slightly from ours: with an optimizer in the JSON the Trainer also
decays biases and norms, and under ZeRO-3 transformers initializes a new model in another order.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, GPT2Config, HfArgumentParser, Trainer, TrainingArguments

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.dataset import DATA_FOLDER, open_dataset
from training import deepspeed_engine, distributed
from training.errors import UserError


@dataclass
class Arguments(TrainingArguments):
    dataset: str = "shakespeare_char"  # folder under data/, or a path, with train.bin and val.bin
    block_size: int = 64  # tokens per sequence
    model: str = ""  # name on the hub, or a folder written by tools.convert --to=hf; empty: a small new GPT-2


def collate(sequences: list[np.ndarray]) -> dict[str, torch.Tensor]:
    ids = torch.from_numpy(np.stack(sequences).astype(np.int64))
    return {"input_ids": ids, "labels": ids}  # the model shifts the labels


def main() -> None:
    with distributed.start("auto", "auto", process_group=True) as ranks:
        parser = HfArgumentParser(Arguments, description=__doc__)
        parser.set_defaults(use_cpu=ranks.device.type == "cpu", output_dir="out-hf", max_steps=100, logging_steps=10)
        parser.set_defaults(disable_tqdm=True, log_level_replica="error", report_to="none", save_strategy="no")
        arguments = parser.parse_args_into_dataclasses()[0]
        with ranks.together():  # one message, not one per rank
            dataset = open_dataset(DATA_FOLDER / arguments.dataset)
        if arguments.deepspeed:
            import deepspeed

            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # see train_deepspeed.py
            deepspeed.init_distributed(verbose=False)  # else ZeRO-3 on CPU ranks sees a single rank
            deepspeed_engine.load(deepspeed, arguments.hf_deepspeed_config.config, ranks)  # one rank compiles
        torch.manual_seed(arguments.seed)
        block_size, end = arguments.block_size, dataset.tokenizer.end_of_text
        if arguments.model:  # after TrainingArguments, so that ZeRO-3 partitions each weight as it is created
            model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
        else:
            sizes = {"n_positions": block_size, "n_layer": 4, "n_head": 4, "n_embd": 128}
            config = GPT2Config(vocab_size=dataset.vocab_size, bos_token_id=end, eos_token_id=end, **sizes)
            model = AutoModelForCausalLM.from_config(config)
        most, ids = model.config.n_positions, model.config.vocab_size
        if block_size > most or dataset.vocab_size > ids:
            raise UserError(f"model = {arguments.model!r}: lower block_size to {most}, the data set's ids to {ids}")
        shape = dataset.tokens["train"] // block_size, block_size
        sequences = np.memmap(dataset.path("train"), dataset.dtype, "r", shape=shape)
        trainer = Trainer(model, arguments, collate, sequences)
        trainer.train()
        trainer.save_model()  # on every rank: under ZeRO-3 it gathers the weights
        trainer.save_state()


if __name__ == "__main__":
    distributed.run(main)
