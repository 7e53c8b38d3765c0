"""Train a GPT with plain PyTorch: one process, or DDP where a launcher starts several ranks.

    python train.py config/train_shakespeare_char.py --device=cpu --compile=False
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
    ./launch_traditional_ddp.sh 8 config/train_gpt2.py --batch_size=16

Arguments are config files and --key=value, in any order; the later one wins.
"""

import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.nn.utils import clip_grad_norm_

from model import GPT
from training import checkpoint, distributed, ending, loop, memory, run_folder
from training.batches import Batches
from training.checkpoint import Checkpoints, read_about
from training.config import parse
from training.distributed import Ranks, pick_dtype
from training.optim import adamw, parameter_groups, set_learning_rate
from training.origin import Origin, find_origin
from training.saved_state import open_state
from training.train_config import TrainConfig


class Trainer:
    """Every rank holds the whole model state: parameters, gradients, optimizer states."""

    def __init__(self, cfg: TrainConfig, ranks: Ranks, batches: Batches, origin: Origin, dtype: torch.dtype):
        self.cfg, self.ranks, self.batches, self.dtype = cfg, ranks, batches, dtype
        with torch.device("meta"):  # no memory and no time for weights that are overwritten at once
            self.model = GPT(origin.model)
        self.model.materialise(ranks.device)
        if origin.weights:
            checkpoint.fill(self.model, origin.weights)
        elif not origin.checkpoint:
            self.model.init_weights(cfg.seed)
        self.optimizer = adamw(parameter_groups(self.model, cfg.weight_decay), cfg)
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=dtype == torch.float16)
        mixed = dtype != torch.float32
        self.autocast = torch.autocast(ranks.device.type, dtype) if mixed else nullcontext()
        if cfg.compile:
            self.model.compile()  # in place: parameter names stay as they are
        self.ddp: DDP | None = None
        if ranks.world_size > 1:
            gpus = [ranks.device.index] if ranks.device.type == "cuda" else None
            self.ddp = DDP(self.model, device_ids=gpus, gradient_as_bucket_view=True)
        self.strategy = "ddp" if self.ddp else "single"
        if origin.checkpoint:
            self.load(origin.checkpoint)

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """For evaluation: no dropout, and not through DDP, which has nothing to synchronise."""
        self.model.eval()
        with self.autocast:
            loss = self.model(tokens, targets)
        self.model.train()
        return loss

    def train_step(self, step: int) -> tuple[Tensor, Tensor | None, float]:
        """One update. Returns this rank's mean loss, the norm of the global gradient (both still on the device), lr."""
        lr = set_learning_rate(self.optimizer, self.cfg, step)
        micro_steps = self.batches.micro_steps
        mean_loss = torch.zeros((), device=self.ranks.device)
        for micro_step in range(micro_steps):
            if self.ddp:  # one all-reduce a step; DDP reads this in forward, so it is set before it
                self.ddp.require_backward_grad_sync = micro_step == micro_steps - 1
            if self.cfg.dropout:
                torch.manual_seed(self.batches.dropout_seed(step, micro_step))
            tokens, targets = self.batches.train(step, micro_step)
            with self.autocast:
                loss = (self.ddp or self.model)(tokens, targets) / micro_steps
            self.scaler.scale(loss).backward()
            mean_loss += loss.detach()
        grad_norm = None
        if self.cfg.grad_clip:
            self.scaler.unscale_(self.optimizer)
            grad_norm = clip_grad_norm_(self.model.parameters(), self.cfg.grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return mean_loss, grad_norm, lr

    def save(self, folder: Path) -> None:
        """Every rank has the same state: the main one writes it."""
        if self.ranks.main:
            checkpoint.write(folder / "model.pt", dict(self.model.named_parameters()))
            state = {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
            checkpoint.write(folder / "optimizer.pt", state)

    def load(self, folder: Path) -> None:
        """A checkpoint of any strategy."""
        saved = open_state(folder, read_about(folder))
        saved.into(self.model, self.optimizer)
        self.scaler.load_state_dict({**self.scaler.state_dict(), **saved.scaler})


def main() -> None:
    cfg = parse(TrainConfig, sys.argv[1:], __doc__ or "")
    with distributed.start(cfg.device, cfg.backend, cfg.hang_minutes) as ranks:
        checkpoints = Checkpoints(cfg.out_dir, ranks, cfg.keep_checkpoints)
        with ranks.together():
            dtype = pick_dtype(cfg.dtype, ranks.device)
            batches = Batches(cfg, ranks)
            origin = find_origin(cfg, checkpoints, batches.dataset)
        run_folder.prepare(cfg, ranks, origin)
        with memory.explained(cfg, ranks, origin.model, "ddp" if ranks.world_size > 1 else "single", dtype):
            trainer = Trainer(cfg, ranks, batches, origin, dtype)
            loop.train(cfg, ranks, batches, trainer, checkpoints, origin)


if __name__ == "__main__":
    ending.run(main)
