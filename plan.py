"""What fits, and how fast: a model under every strategy, predicted before you rent the GPUs.

    python plan.py --model=gpt2-xl --gpus=8 --gpu-memory=80GB
    python plan.py --model=llama2-7b --gpus=8 --nodes=4 --device=H100 --link=8x400Gb --all
    python plan.py --parameters=7.5e9 --gpus=8 --curve=curve.png
    python plan.py --calibrate=machine.json --gpus=2
    python plan.py --machine=machine.json --gpus=2 --n_layer=4 --n_head=4 --n_embd=256 --block_size=128

It prints the best micro-batch of each strategy, which one to take and why, and the lines to paste. --explain names
every formula with its source, and every assumption; each has an option that replaces it. Where nothing fits, it says
how many GPUs would do, and ends with status 2.
"""

import sys

from training import ending
from training.errors import UserError
from training.plan import calibrate, curve, explain, report, request
from training.plan.choice import best_of_each, options, recommended
from training.plan.options import parse


def main() -> None:
    args = parse(sys.argv[1:], __doc__ or "")
    if args.calibrate is not None or args.probe:
        calibrate.run(args)
        return
    shape, system = request.shape(args), request.system(args)
    if args.curve is not None:
        print(curve.run(args, shape, system))
        return
    wish = request.wish(args, shape, system)
    found = list(options(wish))
    bests = best_of_each(found)
    taken = recommended(bests)
    if args.json:
        print(report.as_json(wish, found, taken, bests))
    else:
        print(report.text(wish, found if args.all else bests, bests, taken, sys.stdout.isatty()))
    if args.explain:
        print("\n" + explain.text(system))
    if not taken:
        raise UserError(report.lacking(bests, curve.enough(args, shape, system)))


if __name__ == "__main__":
    ending.run(main)
