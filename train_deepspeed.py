"""Train a GPT with DeepSpeed: ZeRO-0, 1, 2 or 3, with offload to CPU or NVMe, as a JSON file says.

    ./launch_deepspeed_zero2.sh 8 config/train_gpt2_deepspeed_zero2.py --batch_size=16
    deepspeed --num_gpus=8 train_deepspeed.py config/train_gpt2_deepspeed_zero3.py
    torchrun --standalone --nproc_per_node=8 train_deepspeed.py config/train_gpt2_deepspeed_zero1.py

Arguments are config files and --key=value, in any order; the later one wins.
"""

import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from model import GPT, initial_value
from training import checkpoint, deepspeed_config, distributed, loop, run_folder
from training.batches import Batches
from training.checkpoint import Checkpoints
from training.config import parse
from training.deepspeed_config import DeepSpeedTrainConfig, Json
from training.distributed import Ranks, pick_dtype
from training.optim import adamw, parameter_groups, set_learning_rate
from training.origin import Origin, find_origin


class Trainer:
    """Every rank holds its partition of the model state: of as much of it as the ZeRO stage says."""

    def __init__(self, cfg: DeepSpeedTrainConfig, ranks: Ranks, batches: Batches, origin: Origin, config: Json):
        import deepspeed  # not above: where it works is decided when it is imported, and --device is known here only

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed()

        self.cfg, self.ranks, self.batches = cfg, ranks, batches
        self.strategy = deepspeed_config.strategy(config)
        self.partitioned = self.strategy.startswith("zero3")
        if self.partitioned:  # each parameter is split over the ranks as soon as its module is made
            with deepspeed.zero.Init(config_dict_or_path=config):
                self.model = GPT(origin.model)
        else:
            with torch.device("meta"):  # no memory and no time for weights that are overwritten at once
                self.model = GPT(origin.model)
            self.model.materialise(ranks.device)
        if not origin.checkpoint:
            self.fill(origin)
        own = None if "optimizer" in config else adamw(self.model, cfg)
        self.engine, self.optimizer, _, self.scheduler = deepspeed.initialize(
            model=self.model,
            optimizer=own,
            model_parameters=parameter_groups(self.model, cfg.weight_decay),
            config=config,
        )
        if origin.checkpoint:
            self.load(origin.checkpoint)

    @torch.no_grad()
    def fill(self, origin: Origin) -> None:
        """One parameter after the other, so that no rank ever holds the whole of a partitioned model."""
        import deepspeed

        for name, parameter in self.model.named_parameters():
            with deepspeed.zero.GatheredParameters(parameter, modifier_rank=0, enabled=self.partitioned):
                if self.ranks.main or not self.partitioned:
                    fresh = origin.weights is None
                    value = initial_value(name, parameter.shape, origin.model, self.cfg.seed) if fresh else origin.weights[name]
                    parameter.copy_(value)

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """For evaluation: no dropout."""
        self.engine.eval()
        loss = self.engine(tokens, targets)
        self.engine.train()
        return loss

    def train_step(self, step: int, lr: float) -> tuple[Tensor, Tensor | None]:
        """One update. Returns this rank's mean loss and the norm of the global gradient, both still on the device."""
        set_learning_rate(self.optimizer, lr)
        micro_steps = self.batches.micro_steps
        mean_loss = torch.zeros((), device=self.ranks.device)
        for micro_step in range(micro_steps):
            if self.cfg.dropout:
                torch.manual_seed(self.batches.dropout_seed(step, micro_step))
            tokens, targets = self.batches.train(step, micro_step)
            loss = self.engine(tokens, targets)
            self.engine.backward(loss)  # divides by micro_steps; averages the gradients over the ranks
            mean_loss += loss.detach() / micro_steps
            self.engine.step()  # clips and updates after the last micro-step, does nothing before
        return mean_loss, torch.as_tensor(self.engine.get_global_grad_norm() or 0.0)

    def save(self, folder: Path) -> None:
        """Every rank writes its partition."""
        self.engine.save_checkpoint(folder.parent, tag=folder.name, save_latest=False)

    def load(self, folder: Path) -> None:
        self.engine.load_checkpoint(folder.parent, tag=folder.name)


def main() -> None:
    cfg = parse(DeepSpeedTrainConfig, deepspeed_config.arguments(sys.argv[1:]), __doc__ or "")
    json = deepspeed_config.read(Path(cfg.deepspeed_config))
    with distributed.start(cfg.device, cfg.backend, alone=True) as ranks:
        checkpoints = Checkpoints(cfg.out_dir, ranks, cfg.keep_checkpoints)
        with ranks.together():
            dtype = pick_dtype(deepspeed_config.wanted_dtype(cfg, json), ranks.device)
            batches = Batches(cfg, ranks)
            origin = find_origin(cfg, checkpoints, batches.dataset)
            json = deepspeed_config.resolve(cfg, ranks, origin.model, json, dtype)
        run_folder.prepare(cfg, ranks)
        trainer = Trainer(cfg, ranks, batches, origin, json)
        trainer.dtype = dtype
        loop.train(cfg, ranks, batches, trainer, checkpoints, origin)


if __name__ == "__main__":
    distributed.run(main)
