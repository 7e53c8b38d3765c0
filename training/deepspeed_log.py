"""What DeepSpeed says: breakdowns, profiles and warnings go to out_dir/deepspeed.log, not between a run's lines."""

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from training.deepspeed_config import DeepSpeedTrainConfig
from training.distributed import Ranks


class DeepSpeedLog:
    """To be made after DeepSpeed was imported, as it has its logger then. With --verbose, all goes to the terminal."""

    def __init__(self, cfg: DeepSpeedTrainConfig, ranks: Ranks):
        self.ranks = ranks
        path = Path(cfg.out_dir) / "deepspeed.log" if ranks.main and not (cfg.verbose or cfg.eval_only) else None
        self.file: TextIO | None = path.open("a", buffering=1) if path else None
        level = logging.INFO if cfg.verbose else logging.WARNING if self.file else logging.ERROR
        logger = logging.getLogger("DeepSpeed")
        logger.setLevel(level)
        for handler in logger.handlers:
            handler.setLevel(level)
            if self.file and isinstance(handler, logging.StreamHandler):
                handler.setStream(self.file)
        if not cfg.verbose:
            warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")

    def describe(self, strategy: str, engine: Any) -> None:
        """Which optimizer runs, and whose schedule, if DeepSpeed's."""
        if self.ranks.main:
            optimizer, schedule = type(engine.basic_optimizer), engine.lr_scheduler
            text = f"{strategy}: {optimizer.__name__} of {optimizer.__module__.split('.')[0]}"
            print(text + (f", {type(schedule).__name__}" if schedule else ""), flush=True)

    @contextlib.contextmanager
    def about(self, what: str) -> Iterator[None]:
        """Around calls of DeepSpeed: a line with `what` stands above their words, where there are any."""
        if self.file:
            with contextlib.redirect_stdout(Headed(self.file, what)):
                yield
        else:
            yield


class Headed:
    """A text stream with a heading, which is written only if something follows."""

    def __init__(self, file: TextIO, heading: str):
        self.file, self.heading = file, f"\n{heading}\n"

    def write(self, text: str) -> int:
        self.file.write(self.heading + text)
        self.heading = ""
        return len(text)

    def flush(self) -> None:
        self.file.flush()
