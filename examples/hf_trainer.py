"""Train a GPT-2 of `transformers` by Hugging Face's Trainer, with deepspeed_configs/*.json as they are.

    python launch.py 8 examples/hf_trainer.py --deepspeed=deepspeed_configs/zero2_config.json --learning_rate=1e-3
    deepspeed --num_gpus=8 examples/hf_trainer.py --deepspeed=deepspeed_configs/zero3_config.json --model=gpt2-xl \
        --dataset=shakespeare --block_size=1024 --bf16 --per_device_train_batch_size=1 --gradient_accumulation_steps=4

torchrun starts it as well; without --deepspeed it is DDP. Arguments are those of Settings, below, and all that
TrainingArguments has. The model goes to --output_dir, where transformers and convert.py read it.

Where curves are compared: with an optimizer in the JSON, the Trainer decays biases and norms as well, which it does not
under DDP, nor do our scripts; and under ZeRO-3 `transformers` draws a new model's weights in another order.
"""

import logging
import sys
import warnings
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.dataset import HERE, Dataset, open_dataset
from training import deepspeed_ops, distributed, ending
from training.distributed import Ranks
from training.errors import UserError


def key(default: Any, meaning: str) -> Any:
    return field(default=default, metadata={"help": meaning})


@dataclass
class Settings:
    dataset: str = key("shakespeare_char", "a prepared data set: a folder under data/, or a path")
    block_size: int = key(64, "tokens in a sequence")
    model: str = key("", "a folder as `convert.py --to=hf` writes it, or a name of the hub; empty: a new GPT-2")
    n_layer: int = key(4, "blocks of a new one")
    n_head: int = key(4, "its heads")
    n_embd: int = key(128, "its width")
    dropout: float = key(0.0, "its dropout")


class Sequences(torch.utils.data.Dataset):
    """The tokens of train.bin, cut every block_size. The Trainer shuffles them; the model shifts its labels itself."""

    def __init__(self, dataset: Dataset, block_size: int):
        self.tokens, self.block_size = np.memmap(dataset.path("train"), dataset.dtype, "r"), block_size

    def __len__(self) -> int:
        return len(self.tokens) // self.block_size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        start = index * self.block_size
        ids = torch.from_numpy(self.tokens[start : start + self.block_size].astype(np.int64))
        return {"input_ids": ids, "labels": ids}


def read_arguments(device: torch.device) -> tuple[Settings, Any]:
    """Settings and TrainingArguments. Raises UserError for what cannot be."""
    from transformers import HfArgumentParser, TrainingArguments

    def refuse(problem: str) -> None:
        raise ValueError(problem)

    parser = HfArgumentParser([Settings, TrainingArguments], description=__doc__)  # type: ignore[arg-type, list-item]
    parser.error = refuse  # type: ignore[method-assign, assignment]
    parser.set_defaults(use_cpu=device.type == "cpu", output_dir="out-hf", max_steps=100, logging_steps=10)
    parser.set_defaults(disable_tqdm=True, log_level="error", log_level_replica="error", report_to="none")
    parser.set_defaults(save_strategy="no")
    try:
        settings, arguments = parser.parse_args_into_dataclasses()
    except ValueError as error:
        raise UserError(f"{' '.join(str(error).split())}; --help lists all arguments") from None
    return settings, arguments  # type: ignore[return-value]


def build(settings: Settings, dataset: Dataset) -> Any:
    """The model; after TrainingArguments were made, so that ZeRO-3 partitions every weight as it comes."""
    from transformers import AutoModelForCausalLM, GPT2Config

    if not settings.model:
        about: dict[str, Any] = {"vocab_size": dataset.vocab_size, "n_positions": settings.block_size}
        about |= {name: getattr(settings, name) for name in ("n_layer", "n_head", "n_embd")}
        about |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), settings.dropout)
        about |= dict.fromkeys(("bos_token_id", "eos_token_id"), dataset.tokenizer.end_of_text)
        return AutoModelForCausalLM.from_config(GPT2Config(**about))
    try:
        model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        fix = "give a folder with config.json and model.safetensors, or, where there is a network, a name of the hub"
        raise UserError(f"model = {settings.model!r}: cannot be loaded ({reason}); {fix}") from None
    if settings.block_size > (most := model.config.max_position_embeddings):
        raise UserError(f"block_size = {settings.block_size}: {settings.model} has {most} positions; set at most that")
    if dataset.vocab_size > (known := model.config.vocab_size):
        raise UserError(
            f"dataset = {settings.dataset!r}: has {dataset.vocab_size} ids, {settings.model} knows {known}; "
            "prepare it with the tokenizer of the model"
        )
    return model


def start_deepspeed(config: dict[str, Any], ranks: Ranks) -> None:
    """What the Trainer leaves to its user."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # see train_deepspeed.py
    deepspeed.init_distributed(verbose=False)  # on CPU ranks, ZeRO-3 would take each for the only one
    deepspeed_ops.load(deepspeed, config, ranks)  # two ranks that compile the same op may break it


def main() -> None:
    if missing := [name for name in ("transformers", "accelerate") if not find_spec(name)]:
        raise UserError(f"this needs {' and '.join(missing)}: pip install -r requirements-test.txt")
    with distributed.start("auto", "auto", alone=True) as ranks:
        settings, arguments = read_arguments(ranks.device)
        with ranks.together():  # told once
            dataset = open_dataset(HERE / settings.dataset)
        if arguments.deepspeed:
            start_deepspeed(arguments.hf_deepspeed_config.config, ranks)
        train(settings, arguments, dataset)


def train(settings: Settings, arguments: Any, dataset: Dataset) -> None:
    from transformers import PrinterCallback, Trainer, TrainerCallback, set_seed
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    class Losses(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.is_world_process_zero and "loss" in (logs := kwargs["logs"]):
                print(f"step {state.global_step}: loss {logs['loss']:.4f}", flush=True)

    set_verbosity_error()
    disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # warns of micro-steps, which it leaves to DeepSpeed
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed's calls
    set_seed(arguments.seed)
    sequences = Sequences(dataset, settings.block_size)
    trainer = Trainer(build(settings, dataset), arguments, train_dataset=sequences, callbacks=[Losses()])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.save_model()  # under ZeRO-3 on every rank: it gathers the weights
    trainer.save_state()  # trainer_state.json: the losses to all digits


if __name__ == "__main__":
    ending.run(main)
