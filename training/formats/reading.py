"""What happens while a source is read: the bar goes on, and pages that were read are let go.

The pages of a mapped file count as memory of the process that has read them, until the system wants them back: a
conversion would seem to need as much as the file is large.
"""

import ctypes
from pathlib import Path

from tqdm import tqdm

MAPS = Path("/proc/self/maps")  # Linux; elsewhere pages go when memory is short, which is as good
DONT_NEED = 4  # madvise(2): MADV_DONTNEED; what is needed again comes from the file
OFTEN = 2**23  # bytes between two looks at MAPS


class Reading:
    """Told of every chunk that was read of a model state (SavedState.done)."""

    def __init__(self, path: Path, bar: tqdm | None = None):
        inside = [path, *path.rglob("*")] if path.is_dir() else [path]
        self.files = {str(file.resolve()) for file in inside}  # the hub's cache has links
        self.bar, self.since = bar, 0

    def __call__(self, numel: int) -> None:
        self.since += 4 * numel
        if self.bar:
            self.bar.update(4 * numel)
        if self.since >= OFTEN:
            self.since = 0
            self.let_go()

    def let_go(self) -> None:
        """Nobody writes to what is mapped here: dropping it loses nothing."""
        if not MAPS.exists():
            return
        libc = ctypes.CDLL(None)
        for line in MAPS.read_text().splitlines():
            addresses, *_, name = line.split(maxsplit=5)
            if name in self.files:
                start, end = (int(address, 16) for address in addresses.split("-"))
                libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), DONT_NEED)
