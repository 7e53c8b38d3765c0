"""Train a GPT with plain PyTorch: one process, DDP where a launcher starts several ranks, or FSDP2.

    python train.py config/train_shakespeare_char.py --device=cpu --compile=False
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
    ./launch_traditional_ddp.sh 8 config/train_gpt2.py --batch_size=16
    ./launch_fsdp.sh 8 config/train_gpt2_xl.py

Arguments are config files and --key=value, in any order; the later one wins.
"""

import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.nn.utils import clip_grad_norm_

from model import GPT
from training import distributed, ending, loop, memory, run_folder, sharding
from training.batches import Batches
from training.checkpoint import Checkpoints
from training.compiler import leave_out
from training.config import parse
from training.distributed import Ranks, pick_dtype
from training.optim import adamw, parameter_groups, set_learning_rate
from training.origin import Origin, find_origin
from training.saved_state import reading
from training.saving import Files
from training.sharding import PlainTrainConfig, strategy_of


class Trainer:
    """Every rank holds the whole model state: parameters, gradients, optimizer states; under FSDP2 a shard of it."""

    def __init__(self, cfg: PlainTrainConfig, ranks: Ranks, batches: Batches, origin: Origin, dtype: torch.dtype):
        self.cfg, self.ranks, self.batches, self.dtype = cfg, ranks, batches, dtype
        self.strategy = strategy_of(cfg, ranks)
        with torch.device("meta") if self.strategy == "fsdp" else ranks.device:
            self.model = GPT(origin.model)
        if self.strategy == "fsdp":
            self.shard()
            self.model.materialise(torch.device("cpu") if cfg.cpu_offload else ranks.device)
        elif cfg.compile:
            self.model.compile()  # in place: parameter names stay as they are
        if not origin.checkpoint:
            self.fill(origin)
        self.optimizer = adamw(parameter_groups(self.model, cfg.weight_decay), cfg)
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=dtype == torch.float16)
        mixed = dtype != torch.float32 and self.strategy != "fsdp"
        self.autocast = torch.autocast(ranks.device.type, dtype) if mixed else nullcontext()
        self.ddp: DDP | None = None
        if self.strategy == "ddp":
            gpus = [ranks.device.index] if ranks.device.type == "cuda" else None
            self.ddp = DDP(self.model, device_ids=gpus, gradient_as_bucket_view=True)
        if origin.checkpoint:
            self.load(origin.checkpoint)

    def shard(self) -> None:
        """A block's weights are gathered before it runs, in dtype; its gradients are reduced, in fp32, when it has."""
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard  # 0.5 s

        cfg, on_gpu = self.cfg, self.ranks.device.type == "cuda"
        policy = MixedPrecisionPolicy(param_dtype=self.dtype, reduce_dtype=torch.float32)
        offload = CPUOffloadPolicy(pin_memory=on_gpu) if cfg.cpu_offload else OffloadPolicy()
        over = partial(fully_shard, mesh=sharding.mesh(cfg, self.ranks), mp_policy=policy, offload_policy=offload)
        for block in self.model.transformer.h:
            if cfg.compile:
                block.compile()
            over(block, reshard_after_forward=cfg.reshard_after_forward)
        over(self.model, reshard_after_forward=False)  # the embedding, which backward begins with

    @torch.no_grad()
    def fill(self, origin: Origin) -> None:
        """One parameter after the other, so that no rank ever holds the whole of a sharded model."""
        for name, parameter in self.model.named_parameters():
            sharding.put(parameter, origin.value(name, parameter.shape, self.cfg.seed))

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
            grad_norm = sharding.whole(grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return mean_loss, grad_norm, lr

    def save(self, files: Files) -> None:
        """Of what every rank has, the main one writes the whole; of what is sharded, each its part."""
        if self.strategy == "fsdp":
            for module in (*self.model.transformer.h, self.model):
                module.reshard()  # an evaluation leaves what it gathered last
            sharding.save(files, self.model, self.optimizer, self.scaler)
        elif self.ranks.main:
            files.write("model.pt", dict(self.model.named_parameters()))
            state = {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
            files.write("optimizer.pt", state)

    def load(self, folder: Path) -> None:
        """A checkpoint of any strategy."""
        with reading(folder, self.ranks) as saved:
            saved.into(self.model, self.optimizer)
        self.scaler.load_state_dict({**self.scaler.state_dict(), **saved.scaler})


def main() -> None:
    cfg = parse(PlainTrainConfig, sys.argv[1:], __doc__ or "")
    leave_out(unless=cfg.compile)
    fsdp = cfg.strategy == "fsdp"
    with distributed.start(cfg.device, cfg.backend, cfg.hang_minutes, alone=fsdp, host=cfg.cpu_offload) as ranks:
        checkpoints = Checkpoints(cfg.out_dir, ranks, cfg.keep_checkpoints)
        with ranks.together():
            dtype = pick_dtype(cfg.dtype, ranks.device)
            batches = Batches(cfg, ranks)
            origin = find_origin(cfg, checkpoints, batches.dataset)
        run_folder.prepare(cfg, ranks, origin)
        with memory.explained(cfg, ranks, origin.model, strategy_of(cfg, ranks), dtype):
            trainer = Trainer(cfg, ranks, batches, origin, dtype)
            loop.train(cfg, ranks, batches, trainer, checkpoints, origin)


if __name__ == "__main__":
    ending.run(main)
