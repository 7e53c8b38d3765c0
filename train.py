"""Train a GPT with plain PyTorch: one process, DDP when a launcher starts several ranks, or FSDP2.

    python train.py config/train_shakespeare_char.py --device=cpu --compile=False
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
    ./launch_traditional_ddp.sh 8 config/train_gpt2.py --batch_size=16
    ./launch_fsdp.sh 8 config/train_gpt2_xl.py

Arguments are config files and --key=value, in any order; later values win.

The outer loop (evaluation, checkpoints, logging, stopping) is in training/loop.py, shared with train_deepspeed.py. This
file has what differs: how the model is built and wrapped, how a step is taken, and what is saved and loaded.
"""

import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports below ends without a traceback

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.nn.utils import clip_grad_norm_

from model import GPT
from training import distributed, fsdp, loop, run_folder
from training.batches import Batches
from training.checkpoint import Checkpoints, CheckpointWriter
from training.config import PlainTrainConfig, parse
from training.distributed import Ranks, pick_dtype
from training.init import InitState, find_init_state
from training.optim import make_optimizer, set_learning_rate, states_by_name


class Trainer:
    """Every rank holds the whole model state: parameters, gradients and optimizer states; under FSDP2 a shard of it."""

    def __init__(self, cfg: PlainTrainConfig, ranks: Ranks, batches: Batches, init: InitState, dtype: torch.dtype):
        self.cfg, self.ranks, self.batches, self.dtype = cfg, ranks, batches, dtype
        self.strategy = cfg.strategy_name(ranks.world_size)
        with torch.device("meta") if self.strategy == "fsdp" else ranks.device:
            self.model = GPT(init.model)
        if cfg.sequence_parallel > 1:
            from training.parallel import split_sequences

            split_sequences(self.model, cfg.block_size, ranks)
        if cfg.compile:  # in place: parameter names stay the same
            self.model.compile() if self.strategy == "single" else self.model.compile_parts()
        if self.strategy == "fsdp":
            self.shard()
            self.model.materialize(torch.device("cpu") if cfg.cpu_offload else ranks.device, ranks.device)
        if not init.checkpoint:
            self.fill(init)
        self.optimizer = make_optimizer(self.model, cfg)
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=dtype == torch.float16)
        use_autocast = dtype != torch.float32 and self.strategy != "fsdp"
        self.autocast = torch.autocast(ranks.device.type, dtype, enabled=use_autocast)
        self.ddp: DDP | None = None
        if self.strategy == "ddp" and not cfg.outer_steps:
            self.ddp = DDP(self.model, gradient_as_bucket_view=True)
        self.link: Any = None
        averages_in_fp32 = cfg.grad_compression == "none" and cfg.exchange_dtype() == torch.float32
        if self.strategy == "ddp" and (cfg.outer_steps or not averages_in_fp32):
            from training.slow_links import make_link  # few runs need it

            self.link = make_link(self.model, self.ddp, self.optimizer, cfg, ranks)
        if init.checkpoint:
            self.load(init.checkpoint)
        self.balance: Any = None
        if cfg.n_expert and cfg.expert_balance:
            from training.parallel import Balance

            self.balance = Balance(self.model, init.model, cfg.expert_balance)

    def shard(self) -> None:
        """Each block's parameters are gathered in dtype before it runs; its gradients are averaged in fp32 after it."""
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard  # 0.5 s

        cfg, on_gpu = self.cfg, self.ranks.device.type == "cuda"
        mixed_precision = MixedPrecisionPolicy(param_dtype=self.dtype, reduce_dtype=cfg.exchange_dtype())
        offload = CPUOffloadPolicy(pin_memory=on_gpu) if cfg.cpu_offload else OffloadPolicy()
        mesh = fsdp.shard_mesh(cfg, self.ranks)
        shard = partial(fully_shard, mesh=mesh, mp_policy=mixed_precision, offload_policy=offload)
        for block in self.model.transformer.h:
            shard(block, reshard_after_forward=cfg.reshard_after_forward)
        shard(self.model, reshard_after_forward=False)  # the embedding, which backward needs first

    @torch.no_grad()
    def fill(self, init: InitState) -> None:
        """One parameter at a time, so that no rank ever holds all of a sharded model."""
        for name, parameter in self.model.named_parameters():
            whole = init.value(name, parameter.shape, self.cfg.seed)
            local, start = fsdp.local_part(parameter)
            local.copy_(whole.flatten()[start : start + local.numel()].view_as(local))

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """For evaluation: without dropout, and without DDP, which has nothing to synchronize."""
        self.model.eval()
        with self.autocast:
            loss = self.model(tokens, targets)
        self.model.train()
        return loss

    def train_step(self, step: int) -> dict[str, Any]:
        """One update. Returns what the loop logs; loss (this rank's mean) and grad_norm stay on the device."""
        lr = set_learning_rate(self.optimizer, self.cfg, step)
        micro_steps = self.batches.micro_steps
        mean_loss, grad_norm = torch.zeros((), device=self.ranks.device), None
        for micro_step in range(micro_steps):
            if self.ddp:  # all-reduce in the last micro-step only; DDP reads this in forward, so it is set before it
                self.ddp.require_backward_grad_sync = micro_step == micro_steps - 1
            if self.cfg.dropout:
                torch.manual_seed(self.batches.dropout_seed(step, micro_step))
            tokens, targets = self.batches.train(step, micro_step)
            with self.autocast:
                loss = (self.ddp or self.model)(tokens, targets)
            mean_loss += loss.detach() / micro_steps
            loss = self.balance.add_to(loss) if self.balance else loss
            self.scaler.scale(loss / micro_steps).backward()
        if self.cfg.grad_clip:
            self.scaler.unscale_(self.optimizer)
            norm: Any = clip_grad_norm_(self.model.parameters(), self.cfg.grad_clip)
            grad_norm = norm.full_tensor() if self.strategy == "fsdp" else norm
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.cfg.outer_steps:
            self.link.exchange(step)
        metrics = {"loss": mean_loss, "lr": lr, "grad_norm": grad_norm}
        return metrics | (self.balance.metrics() if self.balance else {})

    def save(self, writer: CheckpointWriter) -> None:
        """Rank 0 writes replicated state; under FSDP2, every rank writes its own shard."""
        if self.strategy == "fsdp":
            for module in (*self.model.transformer.h, self.model):
                module.reshard()  # an evaluation leaves the last gathered parameters
            fsdp.save_shard(writer, self.model, self.optimizer, self.scaler)
        elif self.ranks.main:
            writer.write("model.pt", dict(self.model.named_parameters()))
            states = states_by_name(self.model, self.optimizer)
            writer.write("optimizer.pt", {"optimizer": states, "scaler": self.scaler.state_dict()})
        if self.link:
            self.link.save(writer)

    def load(self, folder: Path) -> None:
        """Load a checkpoint of any strategy."""
        from training.model_state import reading  # new runs do without it

        with reading(folder, self.ranks) as saved:
            saved.into(self.model, self.optimizer)
        self.scaler.load_state_dict({**self.scaler.state_dict(), **saved.scaler})
        if self.link:
            self.link.load(folder)


def main() -> None:
    cfg = parse(PlainTrainConfig, sys.argv[1:], __doc__ or "")
    if not cfg.compile:
        distributed.leave_out_compiler()
    named = cfg.strategy != "auto"  # DDP and FSDP2 need a process group on one rank, too
    start = distributed.start(cfg.device, cfg.backend, cfg.hang_minutes, named, cfg.cpu_offload, cfg.tf32, cfg.layout())
    with start as ranks:
        checkpoints = Checkpoints(cfg.out_dir, ranks, cfg.keep_checkpoints)
        with ranks.together():
            dtype = pick_dtype(cfg.dtype, ranks.device)
            batches = Batches(cfg, ranks)
        run_folder.agree(cfg, ranks, batches)
        init = find_init_state(cfg, checkpoints, batches.dataset)
        run_folder.prepare(cfg, ranks, init)
        with run_folder.explain_out_of_memory(cfg, ranks, init.model, cfg.strategy_name(ranks.world_size), dtype):
            trainer = Trainer(cfg, ranks, batches, init, dtype)
            loop.train(cfg, ranks, batches, trainer, checkpoints, init)


if __name__ == "__main__":
    distributed.run(main)
