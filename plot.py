"""Loss curves of one or several runs, from their metrics.jsonl, as a PNG."""

import argparse
from pathlib import Path

from training.ending import run
from training.errors import UserError
from training.figures import X_LABELS, draw_loss


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="example: python plot.py out-a out-b --x=tokens --output=compare.png"
    )
    parser.add_argument("run", nargs="+", type=Path, help="run folder (out_dir of a training run)")
    parser.add_argument("--x", choices=X_LABELS, default="steps", help="the horizontal axis (default: steps)")
    parser.add_argument("--output", type=Path, help="PNG to write (default: loss.png in the first run folder)")
    arguments = parser.parse_args()
    output = arguments.output or arguments.run[0] / "loss.png"
    if output.suffix != ".png":
        raise UserError(f"--output={output}: must end in .png")
    try:
        draw_loss(arguments.run, output, arguments.x)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror}") from None
    print(output)


if __name__ == "__main__":
    run(main)
