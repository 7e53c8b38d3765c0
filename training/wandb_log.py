"""Weights & Biases, for runs with --wandb_log. It may fail at any time without ending the run."""

import uuid
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import wandb

from training.config import TrainConfig
from training.errors import ConfigError
from training.init import InitState
from training.run_control import RANK_METRICS

PANELS = {"train_loss": "train/loss", "val_loss": "val/loss"}  # nanoGPT's names


def check(cfg: TrainConfig) -> None:
    """Raise ConfigError where W&B would not start: a bad mode or project name, or no key."""
    try:
        settings = wandb.setup(wandb.Settings(silent=True, project=cfg.wandb_project)).settings
        if settings.mode in ("online", "shared", "run"):
            wandb.login(verify=False)
    except (wandb.Error, ValueError) as error:  # ValueError: pydantic's, of several lines
        reason = " ".join(str(error).split("[type=")[0].split())
        raise ConfigError(f"wandb_log = True: W&B cannot start ({reason}); log in or set WANDB_MODE=offline") from None


class WandbLog:
    """A resumed run continues its W&B run, whose id is in the run folder. WANDB_MODE=offline works as usual."""

    def __init__(self, cfg: TrainConfig, init: InitState):
        path = Path(cfg.out_dir) / "wandb_id"
        if not init.checkpoint or not path.exists():
            path.write_text(uuid.uuid4().hex[:8])
        run_name = cfg.wandb_run_name or path.parent.name
        name: Any = {"project": cfg.wandb_project, "name": run_name, "id": path.read_text()}
        settings = wandb.Settings(silent=True)
        self.run: Any = wandb.init(**name, resume="allow", config=asdict(cfg), dir=cfg.out_dir, settings=settings)
        print("W&B:", self.run.url or f"offline; to upload: wandb sync {Path(self.run.dir).parent}", flush=True)

    def log(self, row: dict[str, Any]) -> None:
        values = {PANELS.get(k, k): v for k, v in row.items() if k not in ("kind", "step", *RANK_METRICS)}
        by_rank = {f"{k}/rank {rank}": v for k in RANK_METRICS for rank, v in enumerate(row.get(k, ()))}
        self.call("log", {**values, **by_rank}, step=row["step"])

    def call(self, method: str, *arguments: Any, **options: Any) -> None:
        """Losing W&B is a warning: metrics.jsonl has everything. What it raises differs from version to version."""
        try:
            if self.run:
                getattr(self.run, method)(*arguments, **options)
        except Exception as error:
            print(f"warning: lost W&B ({error!r}); training continues, and metrics.jsonl has all metrics", flush=True)
            self.run = None
            with suppress(Exception):  # stops its handler at exit, which would raise the same again
                wandb.teardown()
