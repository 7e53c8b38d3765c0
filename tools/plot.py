"""Plot the loss curves of training runs from their metrics.jsonl, or a benchmark from its benchmark.json.

    python -m tools.plot out-ddp out-zero2 --x=tokens
    python -m tools.plot results/speed/benchmark.json

The losses of several runs go into one figure, loss_RUN_RUN.png in the current folder; those of one run into its
loss.png. The figures of a benchmark and its page, benchmark.md, are written beside its file.
"""

from pathlib import Path

from tools import benchmark_report
from tools.terminal import make_parser
from training.distributed import run
from training.errors import UserError
from training.figures import draw_loss


def main() -> None:
    parser = make_parser("plot", __doc__)
    parser.add_argument("run", nargs="+", type=Path, help="run folder (out_dir), or a benchmark.json")
    parser.add_argument("--x", choices=("steps", "tokens", "seconds"), default="steps", help="horizontal axis of runs")
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
        draw_loss(path, output, args.run[1:], args.x)
        print(output)


if __name__ == "__main__":
    run(main)
