"""benchmark.json: written once, read by plot.py."""

import json
from pathlib import Path
from typing import Any

from training.errors import UserError
from training.files import write_text

FORMAT = 2  # 1 had no number: speed and memory only
Results = dict[str, Any]  # format, arguments, environment, dtype, steps, rounds, rows


def write(folder: Path, results: Results) -> Path:
    """results: without the format. Returns the file."""
    path = folder / "benchmark.json"
    write_text(path, json.dumps({"format": FORMAT, **results}, indent=1) + "\n")
    return path


def read(path: Path) -> Results:
    """Raises UserError for what is no results file, is of another format, or holds nothing to plot."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: is no results file of benchmark.py: {error}") from None
    if not isinstance(found, dict) or "rows" not in found:
        raise UserError(f"{path}: is no results file of benchmark.py: it has no rows")
    if found.get("format") != FORMAT:
        raise UserError(
            f"{path}: has format {found.get('format', 1)}, this code reads {FORMAT}; "
            "measure it again: python benchmark.py --write=FOLDER ..."
        )
    if not any(row.get("tokens_per_second") for row in found["rows"]):
        raise UserError(f"{path}: nothing to plot: no strategy has run to its end")
    return found
