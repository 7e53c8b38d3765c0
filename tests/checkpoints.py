"""Checkpoints of small models, made in this process; as the train scripts and nanoGPT write them."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from model import GPT, GPTConfig, initial_value
from training.checkpoint import Checkpoints, Saver
from training.config import TrainConfig
from training.model_state import SavedState
from training.optim import make_optimizer, states_by_name

SMALL = GPTConfig(block_size=32, vocab_size=320, n_layer=2, n_head=2, n_embd=32, bias=True)
BYTES = {"name": "byte"}
STEPS = 3


def greedy(logits: Tensor) -> Tensor:
    """For GPT.generate: the most likely token."""
    return logits.argmax(-1, keepdim=True)


@torch.no_grad()
def initialized(model: GPT, seed: int) -> GPT:
    """The model, with its initial weights."""
    for name, parameter in model.named_parameters():
        parameter.copy_(initial_value(name, parameter.shape, model.config, seed))
    return model


@torch.enable_grad()
def trained(config: GPTConfig = SMALL) -> tuple[GPT, Optimizer]:
    """A model and its AdamW after STEPS steps on random tokens."""
    torch.manual_seed(0)
    model = initialized(GPT(config), 0)
    optimizer = make_optimizer(model, TrainConfig(learning_rate=1e-3))
    for _ in range(STEPS):
        tokens = torch.randint(config.vocab_size, (2, config.block_size + 1))
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), optimizer


def metadata(config: GPTConfig = SMALL, **changes: Any) -> dict[str, Any]:
    """A checkpoint.json without its files."""
    about = {"step": STEPS, "best_val_loss": 1.5, "evaluated": True, "model": asdict(config), "init_from": "scratch"}
    about |= {"tokenizer": BYTES, "vocab_size": 257, "strategy": "single", "world_size": 1, "dtype": "float32"}
    return {**about, **changes}


def run_folder(
    folder: Path, config: GPTConfig = SMALL, tokenizer: dict[str, Any] | None = None
) -> tuple[GPT, Optimizer]:
    """As train.py leaves it."""
    model, optimizer = trained(config)
    ids = {"tokenizer": tokenizer or BYTES, "vocab_size": 257 if tokenizer is None else config.vocab_size}
    with Saver(Checkpoints(str(folder))).writing({**metadata(config), **ids}, best=False) as files:
        files.write("model.pt", dict(model.named_parameters()))
        files.write("optimizer.pt", {"optimizer": states_by_name(model, optimizer), "scaler": {}})
    return model, optimizer


def nanogpt_file(path: Path, config: GPTConfig = SMALL, prefix: str = "", **changes) -> tuple[GPT, Optimizer]:
    """As nanoGPT's train.py writes it, with a prefix before all names, as it has where a model was compiled."""
    model, optimizer = trained(config)
    names = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
    state = {
        "model": {prefix + name: tensor for name, tensor in model.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "model_args": {name: getattr(config, name) for name in names},
        **{"iter_num": STEPS, "best_val_loss": torch.tensor(1.5)},
        "config": {"dataset": "elsewhere", "learning_rate": 1e-3, "beta2": 0.99},
    }
    torch.save({**state, **changes}, path)
    return model, optimizer


def assert_same(saved: SavedState, model: GPT, optimizer: Optimizer | None) -> None:
    """Bit by bit; without optimizer, the weights."""
    assert list(saved.shapes) == [name for name, _ in model.named_parameters()]
    for name, parameter in model.named_parameters():
        assert torch.equal(saved.whole(name), parameter), name
        for kind, moment in optimizer.state[parameter].items() if optimizer else ():
            assert kind == "step" or torch.equal(saved.whole(name, kind), moment), f"{kind} of {name}"
    assert not optimizer or saved.step == STEPS


@torch.no_grad()
def logits(saved: SavedState, config: GPTConfig, tokens: Tensor) -> Tensor:
    """(B, V), of our model."""
    model = GPT(config)
    saved.into(model)
    return model.eval()(tokens)


def weights(saved: SavedState) -> dict[str, Tensor]:
    return {name: saved.whole(name) for name in saved.shapes}
