"""Train a GPT with DeepSpeed: ZeRO-0, 1, 2 or 3, with offload to the CPU or NVMe, as a JSON file says.

    ./launch_deepspeed_zero2.sh 8 config/train_gpt2_deepspeed_zero2.py --batch_size=16
    deepspeed --num_gpus=8 train_deepspeed.py config/train_gpt2_deepspeed_zero3.py
    torchrun --standalone --nproc_per_node=8 train_deepspeed.py config/train_gpt2_deepspeed_zero1.py

Arguments are config files and --key=value, in any order; later values win.

The outer loop (evaluation, checkpoints, logging, stopping) is in training/loop.py, shared with train.py. This file has
what differs: how the engine is built, how a step is taken, and what is saved and loaded.
"""

import signal
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports below ends without a traceback

import torch
from torch import Tensor

from model import GPT, Block, GPTConfig
from training import deepspeed_config, deepspeed_engine, distributed, loop, run_folder
from training.batches import Batches
from training.checkpoint import Checkpoints, CheckpointWriter
from training.config import parse
from training.deepspeed_config import DeepSpeedTrainConfig, Json, strategy_of
from training.distributed import Layout, Ranks
from training.init import InitState, find_init_state
from training.optim import parameter_groups, set_learning_rate


class Trainer:
    """Each rank holds a partition of what the ZeRO stage divides (1: optimizer states, 2: gradients, 3: parameters)."""

    def __init__(
        self, cfg: DeepSpeedTrainConfig, ranks: Ranks, batches: Batches, init: InitState, dtype: torch.dtype, ds: Json
    ):
        import deepspeed  # not at the top: it picks its device when it is imported, and must pick that of --device

        self.deepspeed, self.strategy = deepspeed, strategy_of(ds)
        self.cfg, self.ranks, self.batches, self.dtype = cfg, ranks, batches, dtype
        self.log = deepspeed_engine.DeepSpeedLog(cfg, ranks)
        self.balance: Any = None
        # An op for inference on CPUs: compiling it takes 27 s, and every run would leave 66 MB in /dev/shm.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(verbose=cfg.verbose)  # uses the existing process group
        deepspeed_config.check_values(ds, deepspeed.DeepSpeedConfig, cfg.deepspeed_config)
        deepspeed_engine.load(deepspeed, ds, ranks)
        with self.log.redirect():
            self.build(init, ds)
            self.wrap(ds, init.model)
        if ranks.main:
            print(f"{self.strategy}: {deepspeed_engine.describe_optimizer(self.engine)}", flush=True)
        if init.checkpoint:
            self.load(init.checkpoint)

    def build(self, init: InitState, config: Json) -> None:
        """Create the model and its initial values; under ZeRO-3, no rank ever holds all of it."""
        if self.ranks.layout.pipeline > 1:
            from training.deepspeed_pipeline import build_pipeline

            self.model = build_pipeline(init.model, self.ranks)
        elif self.strategy.startswith("zero3"):
            group = deepspeed_engine.replica_group(self.ranks)
            with self.deepspeed.zero.Init(config_dict_or_path=config, data_parallel_group=group):
                self.model = GPT(init.model)
            self.deepspeed.utils.set_z3_leaf_modules(self.model, [Block])  # gathers a block at once, as FSDP2 does
        else:
            with self.ranks.device:
                self.model = GPT(init.model)
        if not init.checkpoint:
            self.fill(init)
        if self.ranks.layout != Layout():
            from training.deepspeed_parallel import split

            split(self.model, init.model, self.ranks)
        if "activation_checkpointing" in config:
            self.deepspeed.checkpointing.configure(None, deepspeed_config=config)
            self.model.transformer.recompute = self.deepspeed.checkpointing.checkpoint

    @torch.no_grad()
    def fill(self, init: InitState) -> None:
        """One parameter at a time; DeepSpeed distributes a partitioned one from the first rank."""
        for name, parameter in self.model.named_parameters():
            with self.deepspeed.zero.GatheredParameters(parameter, modifier_rank=0):  # no effect below ZeRO-3
                if self.ranks.rank < self.ranks.layout.tensor or not hasattr(parameter, "ds_id"):  # ds_id: partitioned
                    parameter.copy_(init.value(name, parameter.shape, self.cfg.seed))

    def wrap(self, config: Json, model_config: GPTConfig) -> None:
        """Give the model to DeepSpeed, which partitions and runs it."""
        self.engine, self.optimizer, _, self.scheduler = self.deepspeed.initialize(
            model=self.model,
            model_parameters=parameter_groups(self.model, self.cfg),
            optimizer=deepspeed_engine.own_optimizer(self.model, self.cfg, config),
            config=config,
        )
        deepspeed_engine.keep_norm(self.engine)
        if self.cfg.n_expert and self.cfg.expert_balance:
            from training.parallel import Balance

            self.balance = Balance(self.model, model_config, self.cfg.expert_balance)
        if self.cfg.compile:  # the JSON's "compile" block is for DeepSpeed's own compiler
            self.engine.compile() if "compile" in config else self.model.compile_parts()

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """For evaluation: without dropout. A collective under ZeRO-3, like every forward pass."""
        self.engine.eval()
        with self.log.redirect():
            if self.ranks.layout.pipeline > 1:  # the mean over the data-parallel ranks
                loss = self.engine.eval_batch(iter([(tokens, targets)]), num_micro_batches=1).squeeze()
            else:
                loss = self.engine(tokens, targets)
        self.engine.train()
        return loss

    def train_step(self, step: int) -> dict[str, Any]:
        """One update. Returns what the loop logs; loss (this rank's mean) and grad_norm stay on the device."""
        lr = self.engine.get_lr()[0] if self.scheduler else set_learning_rate(self.optimizer, self.cfg, step)
        micro_steps = self.batches.micro_steps
        mean_loss = torch.zeros((), device=self.ranks.device)
        with self.log.redirect():
            if self.ranks.layout.pipeline > 1:  # all micro-steps at once; the mean over the data-parallel ranks
                mean_loss = self.engine.train_batch(self.batches.train(step, n) for n in range(micro_steps)).squeeze()
                micro_steps = 0
            for micro_step in range(micro_steps):
                if self.cfg.dropout:
                    torch.manual_seed(self.batches.dropout_seed(step, micro_step))
                tokens, targets = self.batches.train(step, micro_step)
                loss = self.engine(tokens, targets)
                mean_loss += loss.detach() / micro_steps
                loss = self.balance.add_to(loss) if self.balance else loss
                self.engine.backward(loss)  # divides it by micro_steps, and averages gradients over the ranks
                self.engine.step()  # clips and updates in the last micro-step only
        norm = self.engine.get_global_grad_norm() if self.cfg.optimizer != "muon" else None  # Muon's is of the update
        metrics = {"loss": mean_loss, "lr": lr, "grad_norm": None if norm is None else torch.as_tensor(norm)}
        return metrics | (self.balance.metrics() if self.balance else {})

    def save(self, writer: CheckpointWriter) -> None:
        """Every rank writes its partition in DeepSpeed's format."""
        folder = writer.folder
        with self.log.redirect(), deepspeed_engine.writing(self.engine, writer):
            state = {"step": self.engine.global_steps, **deepspeed_engine.client_state(self.engine)}
            self.engine.save_checkpoint(folder.parent, tag=folder.name, client_state=state, save_latest=False)
            if self.engine._config.comms_config.comms_logger_enabled:
                self.deepspeed.comm.log_summary()

    def load(self, folder: Path) -> None:
        """Load a checkpoint of any strategy and number of ranks: each rank reads its part of it."""
        from training import deepspeed_layout  # most of it is for resuming

        deepspeed_layout.load_partition(self.engine, folder, self.ranks)


def main() -> None:
    cfg = parse(DeepSpeedTrainConfig, sys.argv[1:], __doc__ or "")
    config = deepspeed_config.read(cfg.deepspeed_config)
    if not cfg.compile:
        distributed.leave_out_compiler()
    start = distributed.start(cfg.device, cfg.backend, cfg.hang_minutes, True, tf32=cfg.tf32, layout=cfg.layout())
    with start as ranks:
        checkpoints = Checkpoints(cfg.out_dir, ranks, cfg.keep_checkpoints)
        with ranks.together():
            batches = Batches(cfg, ranks)
        run_folder.agree(cfg, ranks, batches, config)
        init = find_init_state(cfg, checkpoints, batches.dataset)
        with ranks.together():
            config, dtype = deepspeed_config.resolve(cfg, ranks, init.model, config)
        run_folder.prepare(cfg, ranks, init, config)
        out_of_memory = run_folder.explain_out_of_memory(cfg, ranks, init.model, strategy_of(config), dtype)
        with out_of_memory, deepspeed_engine.own_swap_folders(config, ranks):
            trainer = Trainer(cfg, ranks, batches, init, dtype, config)
            loop.train(cfg, ranks, batches, trainer, checkpoints, init)


if __name__ == "__main__":
    distributed.run(main)
