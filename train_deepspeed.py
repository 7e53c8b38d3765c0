"""Train a GPT with DeepSpeed: ZeRO-0, 1, 2 or 3, with offload to CPU or NVMe, as a JSON file says.

    ./launch_deepspeed_zero2.sh 8 config/train_gpt2_deepspeed_zero2.py --batch_size=16
    deepspeed --num_gpus=8 train_deepspeed.py config/train_gpt2_deepspeed_zero3.py
    torchrun --standalone --nproc_per_node=8 train_deepspeed.py config/train_gpt2_deepspeed_zero1.py

Arguments are config files and --key=value, in any order; the later one wins.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from model import GPT
from training import deepspeed_config, deepspeed_ops, deepspeed_rules, distributed, ending, loop, memory, run_folder
from training.batches import Batches
from training.checkpoint import Checkpoints, read_about
from training.compiler import leave_out
from training.config import parse
from training.deepspeed_config import DeepSpeedTrainConfig, Json, strategy_of
from training.deepspeed_files import DeepSpeedFiles
from training.deepspeed_log import DeepSpeedLog
from training.deepspeed_state import is_native, load_native, load_partition, sub_groups
from training.distributed import Ranks, pick_dtype
from training.nvme import own_folder
from training.optim import adamw, parameter_groups, set_learning_rate
from training.origin import Origin, find_origin
from training.saving import Files


class Trainer:
    """Every rank holds a partition of the model state: of as much of it as the ZeRO stage says."""

    def __init__(
        self, cfg: DeepSpeedTrainConfig, ranks: Ranks, batches: Batches, origin: Origin, dtype: torch.dtype, ds: Json
    ):
        import deepspeed  # here: as it is imported it looks for its device, and must find the one of --device

        self.deepspeed, self.strategy = deepspeed, strategy_of(ds)
        self.cfg, self.ranks, self.batches, self.dtype = cfg, ranks, batches, dtype
        self.log = DeepSpeedLog(cfg, ranks)
        # For inference only; it would be compiled at every run's start, and leave 66 MB in /dev/shm at its end.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(verbose=cfg.verbose)  # finds the process group that there is
        deepspeed_rules.nested(ds, deepspeed.DeepSpeedConfig, cfg.deepspeed_config)
        deepspeed_ops.load(deepspeed, ds, ranks)
        with self.log.about("building the model"):
            self.build(origin, ds)
        self.log.describe(self.strategy, self.engine)
        if origin.checkpoint:
            self.load(origin.checkpoint)

    def build(self, origin: Origin, config: Json) -> None:
        if self.strategy.startswith("zero3"):
            with self.deepspeed.zero.Init(config_dict_or_path=config):  # partitions a parameter as soon as it is made
                self.model = GPT(origin.model)
        else:
            with self.ranks.device:
                self.model = GPT(origin.model)
        if not origin.checkpoint:
            self.fill(origin)
        if "activation_checkpointing" in config:
            self.deepspeed.checkpointing.configure(None, deepspeed_config=config)
            self.model.transformer.recompute = self.deepspeed.checkpointing.checkpoint
        groups = parameter_groups(self.model, self.cfg.weight_decay)
        own = None if "optimizer" in config else adamw(groups, self.cfg)
        self.engine, self.optimizer, _, self.scheduler = self.deepspeed.initialize(
            model=self.model, model_parameters=groups, optimizer=own, config=config
        )
        self.plain = isinstance(self.optimizer, torch.optim.Optimizer)  # ZeRO-0: not wrapped
        self.files = DeepSpeedFiles(self.engine)
        if self.cfg.compile:
            self.engine.compile()

    @torch.no_grad()
    def fill(self, origin: Origin) -> None:
        """One parameter after the other, so that no rank ever holds the whole of a partitioned model."""
        for name, parameter in self.model.named_parameters():
            with self.deepspeed.zero.GatheredParameters(parameter, modifier_rank=0):  # nothing, if it is whole
                if self.ranks.main or not hasattr(parameter, "ds_id"):  # whole
                    parameter.copy_(origin.value(name, parameter.shape, self.cfg.seed))

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """For evaluation: no dropout. Under ZeRO-3 a collective, as every forward pass."""
        self.engine.eval()
        with self.log.about("evaluation"):
            loss = self.engine(tokens, targets)
        self.engine.train()
        return loss

    def train_step(self, step: int) -> tuple[Tensor, Tensor | None, float]:
        """One update. Returns this rank's mean loss, the norm of the global gradient (both still on the device), lr."""
        lr = self.engine.get_lr()[0] if self.scheduler else set_learning_rate(self.optimizer, self.cfg, step)
        micro_steps = self.batches.micro_steps
        mean_loss, grad_norm = torch.zeros((), device=self.ranks.device), None
        for micro_step in range(micro_steps):
            if self.cfg.dropout:
                torch.manual_seed(self.batches.dropout_seed(step, micro_step))
            tokens, targets = self.batches.train(step, micro_step)
            with self.log.about(f"step {step}"):
                loss = self.engine(tokens, targets)
                self.engine.backward(loss)  # divides it by micro_steps; averages the gradients over the ranks
                if self.plain and micro_step == micro_steps - 1:
                    grad_norm = get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
                self.engine.step()  # clips and updates after the last micro-step, does nothing before
            mean_loss += loss.detach() / micro_steps
        return mean_loss, grad_norm if self.plain else torch.as_tensor(self.engine.get_global_grad_norm()), lr

    def save(self, files: Files) -> None:
        """Every rank writes its partition, in DeepSpeed's format."""
        step, folder = self.engine.global_steps, files.folder
        with self.log.about(f"saving step {step}"), self.files.into(files):
            state = {"step": step, "sub_groups": sub_groups(self.engine)}
            self.engine.save_checkpoint(folder.parent, tag=folder.name, client_state=state, save_latest=False)
            if self.engine._config.comms_config.comms_logger_enabled:
                self.deepspeed.comm.log_summary()

    def load(self, folder: Path) -> None:
        """DeepSpeed loads what the same strategy wrote on as many ranks; from any other, each rank takes its part."""
        if read_about(folder).items() >= loop.layout(self, self.ranks).items() and is_native(self.engine, folder):
            with self.log.about(f"loading {folder}"):
                load_native(self.engine, folder)
        else:
            load_partition(self.engine, folder, self.ranks)


def main() -> None:
    cfg = parse(DeepSpeedTrainConfig, deepspeed_config.arguments(sys.argv[1:]), __doc__ or "")
    config = deepspeed_config.read(cfg.deepspeed_config)
    leave_out(unless=cfg.compile)
    start = distributed.start(cfg.device, cfg.backend, cfg.hang_minutes, alone=True)
    with start as ranks, own_folder(config, cfg.nvme_path, cfg.out_dir, ranks):
        checkpoints = Checkpoints(cfg.out_dir, ranks, cfg.keep_checkpoints)
        with ranks.together():
            dtype = pick_dtype(deepspeed_config.wanted_dtype(cfg, config), ranks.device)
            batches = Batches(cfg, ranks)
            origin = find_origin(cfg, checkpoints, batches.dataset)
            config = deepspeed_config.resolve(cfg, ranks, origin.model, config, dtype)
        run_folder.prepare(cfg, ranks, origin, config)
        with memory.explained(cfg, ranks, origin.model, strategy_of(config), dtype):
            trainer = Trainer(cfg, ranks, batches, origin, dtype, config)
            loop.train(cfg, ranks, batches, trainer, checkpoints, origin)


if __name__ == "__main__":
    ending.run(main)
