"""Where runs also log to: Weights & Biases and TensorBoard. Either may fail at any time without ending the run."""

import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from training.config import TrainConfig
from training.errors import ConfigError
from training.init import InitState

PANELS = {"train_loss": "train/loss", "val_loss": "val/loss"}  # nanoGPT's names


def check(cfg: TrainConfig) -> None:
    """Raise ConfigError where one would not start: a missing package, a bad mode or project name, no key."""
    if cfg.tensorboard and not find_spec("tensorboard"):
        raise ConfigError("tensorboard = True: the package is missing; pip install tensorboard")
    if cfg.wandb_log:
        import wandb

        try:
            settings = wandb.setup(wandb.Settings(silent=True, project=cfg.wandb_project)).settings
            if settings.mode in ("online", "shared", "run"):
                wandb.login(verify=False)
        except (wandb.Error, ValueError) as error:  # ValueError: pydantic's, of several lines
            reason = f"W&B cannot start ({' '.join(str(error).split('[type=')[0].split())})"
            raise ConfigError(f"wandb_log = True: {reason}; log in or set WANDB_MODE=offline") from None


@dataclass
class Tracker:
    name: str
    send: Callable[[dict[str, Any], int], object]  # takes the numbers and the step
    finish: Callable[[], object]
    abandon: Callable[[], object] = lambda: None  # called once it is lost
    lost: bool = False

    def log(self, row: dict[str, Any]) -> None:
        values = {PANELS.get(k, k): v for k, v in row.items() if k not in ("kind", "step", "matmul_ms")}
        values |= {f"matmul_ms/rank {rank}": ms for rank, ms in enumerate(row.get("matmul_ms", ()))}
        self.call(self.send, values, row["step"])

    def call(self, method: Callable[..., object], *arguments: Any) -> None:
        """Losing it is a warning: metrics.jsonl has everything. What it raises differs from version to version."""
        try:
            if not self.lost:
                method(*arguments)
        except Exception as error:
            print(f"warning: lost {self.name} ({error!r}); training continues, with metrics.jsonl", flush=True)
            self.lost = True
            with suppress(Exception):
                self.abandon()


def start_wandb(cfg: TrainConfig, init: InitState) -> Tracker:
    """A resumed run continues its W&B run, whose id is in the run folder. WANDB_MODE=offline works as usual."""
    import wandb

    path = Path(cfg.out_dir) / "wandb_id"
    if not init.checkpoint or not path.exists():
        path.write_text(uuid.uuid4().hex[:8])
    names: Any = {"project": cfg.wandb_project, "name": cfg.wandb_run_name or path.parent.name, "id": path.read_text()}
    settings = wandb.Settings(silent=True)
    run: Any = wandb.init(**names, resume="allow", config=asdict(cfg), dir=cfg.out_dir, settings=settings)
    print("W&B:", run.url or f"offline; to upload: wandb sync {Path(run.dir).parent}", flush=True)
    # teardown ends its handler at exit, which would raise the same again
    return Tracker("W&B", lambda values, step: run.log(values, step=step), run.finish, wandb.teardown)


def start_tensorboard(cfg: TrainConfig, init: InitState) -> Tracker:
    """Writes to out_dir/tensorboard. A resumed run hides what a killed one logged after its checkpoint."""
    from torch.utils.tensorboard import SummaryWriter  # a second

    writer = SummaryWriter(f"{cfg.out_dir}/tensorboard", purge_step=init.step + 1 if init.checkpoint else 0)

    def send(values: dict[str, Any], step: int) -> None:
        for name, value in values.items():
            if value is not None:
                writer.add_scalar(name, value, step)

    print(f"TensorBoard: tensorboard --logdir={writer.log_dir}", flush=True)
    return Tracker("TensorBoard", send, writer.close)


def start_trackers(cfg: TrainConfig, init: InitState) -> list[Tracker]:
    chosen = ((cfg.wandb_log, start_wandb), (cfg.tensorboard, start_tensorboard))
    return [start(cfg, init) for wanted, start in chosen if wanted]
