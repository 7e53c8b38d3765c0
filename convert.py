"""Checkpoints and weights from one format to another: read by the piece, written, read back, compared.

    python convert.py out-gpt2 gpt2.safetensors
    python convert.py out-gpt2-zero3 gpt2-mine --to=hf --dtype=bfloat16
    python convert.py nanoGPT/out/ckpt.pt out-from-nanogpt --to=train
    python convert.py gpt2-xl out-xl --to=deepspeed --stage=3 --ranks=8

SOURCE is a run folder or one of its checkpoints, of any strategy and number of ranks; nanoGPT's ckpt.pt, or its folder;
a safetensors file that this script wrote; a universal checkpoint of DeepSpeed; a Hugging Face folder of GPT-2, or gpt2,
gpt2-medium, gpt2-large, gpt2-xl.
"""

import argparse
from pathlib import Path
from typing import Any

from data.dataset import HERE, open_dataset
from data.tokenizer import tokenizer_from
from training import ending
from training.errors import ConfigError
from training.formats.conversion import FORMATS, convert
from training.formats.options import DTYPES, VERIFY, Options
from training.units import size

FORMAT = "safetensors, a file of weights; hf, for transformers; nanogpt; train, a run folder; deepspeed; universal"


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = found.add_argument
    add("source", help="what to read")
    add("target", type=Path, help="file or folder to write")
    add("--to", choices=FORMATS, default="safetensors", help=FORMAT)
    add("--dtype", choices=DTYPES, default="float32", help="of the weights in safetensors and hf, of ZeRO's model")
    add("--stage", type=int, default=3, help="of ZeRO, for deepspeed: 1, 2 or 3 (the default)")
    add("--ranks", type=int, default=1, help="that the run of deepspeed will have")
    add("--max_shard_size", default="5GB", help="of the files of weights of hf")
    add("--vocab", type=int, help="rows of the embedding to keep: cuts its padding off")
    add("--tokenizer", help="of the ids, where the source does not say: gpt2, byte ...")
    add("--dataset", help="the same by a prepared data set, a folder under data/ or a path")
    add("--verify", choices=VERIFY, default="logits", help="compare all tensors, and logits; tensors only; nothing")
    add("--force", action="store_true", help="overwrite the target")
    return found


def tokenizer(args: argparse.Namespace) -> dict[str, Any] | None:
    if args.dataset:
        return open_dataset(HERE / args.dataset).tokenizer.describe()
    if args.tokenizer == "char":
        raise ConfigError("--tokenizer=char: its characters are those of a text; give --dataset, prepared of it")
    return tokenizer_from({"name": args.tokenizer}).describe() if args.tokenizer else None


def main() -> None:
    args = parser().parse_args()
    options = Options(
        dtype=args.dtype,
        stage=args.stage,
        ranks=args.ranks,
        max_shard_size=size(args.max_shard_size),
        vocab=args.vocab,
        tokenizer=tokenizer(args),
        verify=args.verify,
    )
    print("\n  ".join(convert(args.source, args.target, args.to, options, args.force)))


if __name__ == "__main__":
    ending.run(main)
