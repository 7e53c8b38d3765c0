"""A file or folder that is there when it is complete, and not before."""

import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from training.errors import ConfigError
from training.files import sync
from training.formats.source import recognise


def check(source: Path, target: Path, force: bool) -> None:
    """Raises ConfigError where nothing may be written."""
    here, there = source.resolve(), target.resolve()
    if source.exists() and (here.is_relative_to(there) or there.is_relative_to(here)):
        raise ConfigError(f"{target}: must be another place than {source}, outside of it")
    if not there.parent.is_dir():
        raise ConfigError(f"{target}: there is no folder {there.parent}; make it first")
    if target.exists() and not force:
        raise ConfigError(f"{target} exists; --force overwrites it")
    if target.is_dir() and any(target.iterdir()) and recognise(target) is None:
        raise ConfigError(f"{target} is a folder of something else than weights; --force overwrites none of those")


@contextmanager
def writing(target: Path) -> Iterator[Path]:
    """A path beside the target to write to, which becomes the target at the end; after an error nothing is left."""
    unfinished = target.with_name(f".{target.stem}.unfinished{target.suffix}")
    before = signal.signal(signal.SIGTERM, stop)
    remove(unfinished)
    try:
        yield unfinished
        for path in [unfinished, *unfinished.rglob("*")]:
            sync(path)
        if target.is_dir():  # a folder cannot be replaced at once: the old one goes aside first
            aside = target.with_name(f".{target.name}.replaced")
            remove(aside)
            target.rename(aside)
            unfinished.rename(target)
            remove(aside)
        else:
            unfinished.replace(target)
    finally:
        remove(unfinished)
        signal.signal(signal.SIGTERM, before)


def stop(number: int, frame: FrameType | None) -> None:
    """SIGTERM ends as an error does: what is unfinished is removed."""
    raise SystemExit(128 + number)


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
