"""What every prepare.py does for its user: options, one message for what goes wrong, downloads."""

import argparse
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from data.errors import DataError


def options(script: str, about: str) -> argparse.ArgumentParser:
    """A parser with --out; the default is the folder of the script."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(script).resolve().parent, help="folder to write to")
    return parser


def run(main: Callable[[], None]) -> None:
    """What the user can mend is one message and status 2."""
    try:
        main()
    except DataError as error:
        message = str(error)
    except OSError as error:
        message = f"{error.filename or 'output'}: {error.strerror or error}"
    except KeyboardInterrupt:
        sys.exit(130)
    else:
        return
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def download(url: str, path: Path) -> Path:
    """url -> path, once; DataError says what to do without a network."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.unfinished")
        try:
            with urllib.request.urlopen(url, timeout=30) as answer, unfinished.open("wb") as file:  # noqa: S310  https
                while part := answer.read(2**20):
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
        except (urllib.error.URLError, TimeoutError) as error:
            reason = getattr(error, "reason", error)
            raise DataError(
                f"cannot download {url} ({reason}); where there is no network, fetch it elsewhere and give --input FILE"
            ) from None
        unfinished.replace(path)
    return path
