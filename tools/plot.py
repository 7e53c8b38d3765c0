"""Plot training runs from their metrics.jsonl, or a benchmark from its benchmark.json.

    python -m tools.plot out-ddp out-zero2 --x=tokens --panels=grad_norm,lr
    python -m tools.plot results/speed/benchmark.json

The loss curves of several runs go into one figure, loss_RUN_RUN.png in the current folder; those of one run into its
loss.png. The figures of a benchmark and its page, benchmark.md, are written beside its file.
"""

from pathlib import Path
from statistics import median
from typing import Any

from tools import benchmark_report
from tools.terminal import make_parser
from training.distributed import run
from training.errors import UserError
from training.figures import draw_run, label_ends, line_style, new_figure, read_run, style_axes


def draw_runs(folders: list[Path], path: Path, x: str, keys: list[str]) -> None:
    """One PNG, with a color and dashes for each run, and a panel below the losses for each key of metrics.jsonl."""
    figure = new_figure(8, 5 + 1.5 * len(keys))
    heights = [4] + [1.5] * len(keys)
    losses, *panels = figure.subplots(len(heights), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for number, folder in enumerate(folders):
        rows, config = read_run(folder)
        size = step_size(rows, config, x)
        draw_run(losses, rows, number, folder.name if len(folders) > 1 else "", size)
        for key, axes in zip(keys, panels, strict=True):
            points = [(row["step"] * size, row[key]) for row in rows if row.get(key) is not None]
            if not points:
                names = ", ".join(sorted({name for row in rows for name in row}))
                raise UserError(f"--panels={key}: {folder / 'metrics.jsonl'} has no such numbers; it has {names}")
            axes.plot(*zip(*points, strict=True), **line_style(number), linewidth=1)
            axes.set_title(key, loc="left")
            axes.yaxis.set_major_formatter("{x:,g}")
            style_axes(axes)
    losses.set_title("validation loss with markers, loss of training batches thin", loc="left")
    label_ends(losses)
    losses.xaxis.set_major_formatter("{x:,.0f}")
    figure.supxlabel(x, fontsize=10)
    figure.savefig(path)


def step_size(rows: list[dict[str, Any]], config: dict[str, Any], x: str) -> float:
    """A step's length on the x axis; in seconds, that of the median step."""
    if x == "tokens":
        return config["gradient_accumulation_steps"] * config["batch_size"] * config["block_size"]
    if x == "seconds":
        return median([row["step_ms"] for row in rows if row.get("step_ms")] or [0]) / 1e3
    return 1


def main() -> None:
    parser = make_parser("plot", __doc__)
    parser.add_argument("run", nargs="+", type=Path, help="run folder (out_dir), or a benchmark.json")
    parser.add_argument("--x", choices=("steps", "tokens", "seconds"), default="steps", help="horizontal axis of runs")
    parser.add_argument("--panels", default="", help="smaller ones below: grad_norm,lr,tokens_per_second,mfu,step_ms")
    parser.add_argument("--output", type=Path, help="PNG of runs (default: RUN/loss.png; of several, loss_RUN_RUN.png)")
    args = parser.parse_args()
    path, names = args.run[0], [folder.resolve().name for folder in args.run]
    output = args.output or (path / "loss.png" if len(names) == 1 else Path(f"loss_{'_'.join(names)}.png"))
    if path.suffix == ".json":
        if args.output or len(args.run) > 1:
            raise UserError(f"{path}: a benchmark is plotted by itself and without --output")
        print(*benchmark_report.write_page(benchmark_report.read(path), path.parent), sep="\n")
    elif output.suffix != ".png":
        raise UserError(f"--output={output}: must end in .png")
    else:
        draw_runs(args.run, output, args.x, [key for key in args.panels.split(",") if key])
        print(output)


if __name__ == "__main__":
    run(main)
