"""List runs, or the checkpoints of one run.

    python -m tools.runs
    python -m tools.runs out-gpt2
    python -m tools.runs out-ddp out-zero2 results

Without a folder: the runs directly below the current one. A folder that is not a run stands for the runs below it.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

from tools.terminal import align, make_parser
from training.figures import read_rows

SIGNS = ("metrics.jsonl", "environment.json", "checkpoints")  # a folder that has one of them is a run
RUNS = ["run", "step", "newest checkpoint", "strategy", "ranks", "best val loss", "size", "last change", "note"]
CHECKPOINTS = ["checkpoint", "strategy", "ranks", "val loss", "size", "note"]
LEFT = {"run", "newest checkpoint", "checkpoint", "strategy", "note"}  # columns of text


def read_json(path: Path) -> dict[str, Any]:
    """{} if the file is missing or not a JSON object, such as half a line of a run that was killed."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def file_sizes(folder: Path) -> dict[str, int]:
    paths = [Path(parent, name) for parent, _, names in os.walk(folder) for name in names]
    return {str(path.relative_to(folder)): path.stat().st_size for path in paths if path.exists()}


def checkpoint_row(run: Path, folder: Path, losses: dict[str, str]) -> list[str]:
    """Checksums are not verified here: training/checkpoint.py does so when a run resumes."""
    metadata, sizes = read_json(folder / "checkpoint.json"), file_sizes(folder)
    files, loss = metadata.get("files"), losses.get(str(metadata.get("step")), "")
    marks = [run / name for name in ("latest", "best") if (run / name).is_file()]
    note = ", ".join(path.name for path in marks if path.read_text(errors="replace").strip() == folder.name)
    if not folder.name.startswith("step_"):
        note = "unfinished: being written, or left by a run that was killed"
    elif not isinstance(files, dict) or not files.items() <= sizes.items():
        note = "damaged: checkpoint.json, or a file that it lists, is missing or has another size"
    layout = [str(metadata.get(key, "")) for key in ("strategy", "world_size")]
    return [folder.name, *layout, loss, f"{sum(sizes.values()) / 1e6:,.1f} MB", note]


def read_run(run: Path) -> tuple[list[str], list[list[str]]]:
    """The cells of RUNS, and those of CHECKPOINTS, newest first."""
    metrics = [row for _, row in read_rows(run / "metrics.jsonl")] if (run / "metrics.jsonl").is_file() else []
    losses = {str(row["step"]): f"{row['val_loss']:.4f}" for row in metrics if row["kind"] == "eval"}
    folders = sorted(run.glob("checkpoints/*step_*"), key=lambda path: path.name.rpartition("_")[2].zfill(20))
    checkpoints = [checkpoint_row(run, folder, losses) for folder in reversed(folders)]
    complete = [cells for cells in checkpoints if ": " not in cells[-1]]
    steps = f"{max((row['step'] for row in metrics), default=0):,} of "
    planned = read_json(run / "config.json").get("max_iters")
    steps += f"{planned:,}" if isinstance(planned, int) else "?"
    newest, best = complete[0][:3] if complete else ["none", "", ""], min(losses.values(), key=float, default="")
    changed = time.localtime(max((run / sign).stat().st_mtime for sign in SIGNS if (run / sign).exists()))
    note = f"{len(checkpoints) - len(complete)} incomplete" if len(complete) < len(checkpoints) else ""
    size = f"{sum(file_sizes(run).values()) / 1e6:,.1f} MB"
    return [str(run), steps, *newest, best, size, time.strftime("%Y-%m-%d %H:%M", changed), note], checkpoints


def main() -> None:
    parser = make_parser("runs", __doc__)
    parser.add_argument("folder", nargs="*", type=Path, help="runs, or folders of runs (default: the current folder)")
    given = parser.parse_args().folder
    folders = [path for folder in given or [Path()] for path in (folder, *sorted(folder.glob("*/")))]
    if not (runs := [folder for folder in folders if any((folder / sign).exists() for sign in SIGNS)]):
        parser.error(f"no run in {', '.join(map(str, given)) or 'this folder'}; name the out_dir of a run")
    rows, checkpoints = zip(*map(read_run, runs), strict=True)
    print(align([RUNS, *sorted(rows, key=lambda row: row[-2], reverse=True)], LEFT))
    if len(given) == 1 and runs == given:
        print("", align([CHECKPOINTS, *checkpoints[0]], LEFT) if checkpoints[0] else "no checkpoint yet", sep="\n")


if __name__ == "__main__":
    main()
