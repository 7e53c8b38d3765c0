"""Plot the losses of training runs from their metrics.jsonl.

    python -m tools.plot out-ddp out-zero2 --x=tokens

Several runs go into one figure, loss_RUN_RUN.png in the current folder; one run into its loss.png.
"""

from pathlib import Path

from tools.terminal import make_parser
from training.distributed import run
from training.errors import UserError
from training.figures import draw_loss


def main() -> None:
    parser = make_parser("plot", __doc__)
    parser.add_argument("run", nargs="+", type=Path, help="run folder (out_dir)")
    parser.add_argument("--x", choices=("steps", "tokens", "seconds"), default="steps", help="horizontal axis")
    parser.add_argument("--output", type=Path, help="PNG (default: RUN/loss.png; of several runs, loss_RUN_RUN.png)")
    args = parser.parse_args()
    folder, names = args.run[0], [folder.resolve().name for folder in args.run]
    output = args.output or (folder / "loss.png" if len(names) == 1 else Path(f"loss_{'_'.join(names)}.png"))
    if output.suffix != ".png":
        raise UserError(f"--output={output}: must end in .png")
    draw_loss(folder, output, args.run[1:], args.x)
    print(output)


if __name__ == "__main__":
    run(main)
