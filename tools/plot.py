"""Plot the losses of training runs, and other numbers, from their metrics.jsonl.

    python -m tools.plot out-ddp out-zero2 --x=tokens
    python -m tools.plot out-ddp --metrics=grad_norm,lr,tokens_per_second

Several runs go into one figure. Every number of --metrics gets a panel below the losses.
"""

from pathlib import Path
from typing import Any

from data.errors import did_you_mean
from tools.terminal import make_parser
from training.distributed import run
from training.errors import UserError
from training.figures import line_style, new_figure, plot_losses, read_run, step_size, style_axes


def plot_metric(axes: Any, name: str, folders: list[Path], x: str) -> None:
    """Plot one number of the training rows. Raises UserError where no run logged it."""
    axes.set(ylabel=name)
    style_axes(axes)
    for number, folder in enumerate(folders):
        rows, config = read_run(folder)
        size = step_size(rows, config, x)
        if points := [(row["step"] * size, row[name]) for row in rows if row["kind"] == "train" and row.get(name)]:
            axes.plot(*zip(*points, strict=True), **line_style(number), linewidth=1)
    if not axes.lines:
        raise UserError(f"--metrics={name}: not logged{did_you_mean(name, {key for row in rows for key in row})}")


def main() -> None:
    parser = make_parser("plot", __doc__)
    parser.add_argument("run", nargs="+", type=Path, help="run folder (out_dir)")
    parser.add_argument("--x", choices=("steps", "tokens", "seconds"), default="steps", help="horizontal axis")
    parser.add_argument("--metrics", default="", help="numbers of metrics.jsonl to plot as well, such as grad_norm,lr")
    parser.add_argument("--output", type=Path, help="PNG (default: RUN/loss.png; of several runs, loss_RUN_RUN.png)")
    args = parser.parse_args()
    folder, names = args.run[0], [folder.resolve().name for folder in args.run]
    metrics = args.metrics.split(",") if args.metrics else []
    output = args.output or (folder / "loss.png" if len(names) == 1 else Path(f"loss_{'_'.join(names)}.png"))
    if output.suffix != ".png":
        raise UserError(f"--output={output}: must end in .png")
    heights = [5, *[2] * len(metrics)]
    figure = new_figure(8, sum(heights))
    losses, *panels = figure.subplots(len(heights), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    plot_losses(losses, args.run, args.x)
    for panel, name in zip(panels, metrics, strict=True):
        plot_metric(panel, name, args.run, args.x)
    figure.savefig(output)
    print(output)


if __name__ == "__main__":
    run(main)
