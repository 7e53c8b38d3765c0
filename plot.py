"""Figures of runs, from their metrics.jsonl, or of a benchmark, from its benchmark.json.

    python plot.py out-ddp out-zero2 --x=tokens --output=compare.png
    python plot.py results/speed/benchmark.json --html=report.html

Runs, of any strategies, are drawn over one another. A benchmark's figures are written beside its file, and with --html
they and all of its numbers as one page, which needs nothing else.
"""

import argparse
from pathlib import Path

from training.benchmark import figures, report, results
from training.ending import run
from training.errors import UserError
from training.figures import X_LABELS, draw_loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = "folder of a training run (out_dir), or a benchmark.json"
    parser.add_argument("run", nargs="+", type=Path, help=what)
    parser.add_argument("--x", choices=X_LABELS, default="steps", help="the horizontal axis (default: steps)")
    parser.add_argument("--output", type=Path, help="PNG of runs (default: loss.png in the first run folder)")
    parser.add_argument("--html", type=Path, help="page of a benchmark, instead of its figures as PNGs")
    arguments = parser.parse_args()
    of_benchmarks = [path for path in arguments.run if path.suffix == ".json"]
    if arguments.html and not of_benchmarks:
        raise UserError(f"--html={arguments.html}: is of a benchmark: name its benchmark.json, not a run folder")
    if of_benchmarks and len(arguments.run) > 1:
        raise UserError(f"{of_benchmarks[0]}: a benchmark is drawn by itself; name nothing besides")
    written = benchmark(arguments) if of_benchmarks else runs(arguments)
    print(*written, sep="\n")


def runs(arguments: argparse.Namespace) -> list[Path]:
    output = arguments.output or arguments.run[0] / "loss.png"
    if output.suffix != ".png":
        raise UserError(f"--output={output}: must end in .png")
    try:
        draw_loss(arguments.run, output, arguments.x)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror}") from None
    return [output]


def benchmark(arguments: argparse.Namespace) -> list[Path]:
    found, (path,) = results.read(arguments.run[0]), arguments.run
    if arguments.output:
        raise UserError(f"--output={arguments.output}: is of runs; a benchmark has --html=FILE, and PNGs beside it")
    if not arguments.html:
        return figures.write(found["rows"], path.parent)
    report.write(found, arguments.html)
    return [arguments.html]


if __name__ == "__main__":
    run(main)
