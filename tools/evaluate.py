"""Evaluate a model: its loss on a whole validation set, or its accuracy on HellaSwag (arXiv:1905.07830).

    python -m tools.evaluate out-gpt2
    python -m tools.evaluate gpt2 --dataset=shakespeare --json
    python -m launch.ranks 8 -m tools.evaluate out-gpt2 --best --task=hellaswag --file=hellaswag_val.jsonl

RUN is a run folder, whose newest checkpoint is taken, or other weights that tools.convert reads. Every rank holds the
whole model, and the ranks share the work. docs/evaluate.md defines the numbers; HellaSwag's are those of
lm-eval-harness.
"""

import json
import math
import re
import sys
from argparse import Namespace
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from data.dataset import DATA_FOLDER, Dataset, open_dataset
from data.errors import DataError, check_types
from data.tokenizer import Tokenizer, tokenizer_from
from model import GPT, GPTConfig
from tools.convert_read import Metadata, add_tokenizer, open_source
from tools.terminal import make_parser
from training import distributed
from training.distributed import Ranks
from training.errors import ConfigError
from training.model_state import SavedState

ORIGINAL = ("activity_label", "ctx_a", "ctx_b")  # keys of the original files; others may have ctx alone


@dataclass(frozen=True)
class Ending:
    """ids: of context and ending, the last block_size + 1 of them; the last `scored` ones are the ending's."""

    ids: list[int]
    scored: int
    characters: int


@torch.no_grad()
def evaluate_loss(model: GPT, dataset: Dataset, ranks: Ranks, batch_size: int) -> dict[str, Any]:
    """Mean over val.bin in consecutive windows, batches of which the ranks share. A collective."""
    path, count, width = dataset.path("val"), dataset.tokens["val"] - 1, model.config.block_size
    whole, size, nats = count // width * width, batch_size * width, 0.0
    batches = [(start, min(start + size, whole), width) for start in range(0, whole, size)]
    if whole < count:
        batches.append((whole, count, count - whole))  # the last window is shorter
    for first, last, length in ranks.progress(batches[ranks.rank :: ranks.world_size], "evaluating"):
        ids = np.fromfile(path, dataset.dtype, last - first + 1, offset=first * dataset.dtype.itemsize)
        if ids.max() >= dataset.vocab_size:
            raise DataError(f"{path} contains id {ids.max()}, outside its vocabulary; prepare it again")
        tokens = torch.from_numpy(ids.astype(np.int64)).to(ranks.device)
        nats += model(tokens[:-1].view(-1, length), tokens[1:].view(-1, length)).item() * (last - first)
    loss = sum(ranks.share(nats)) / count
    if not dataset.val_bytes and ranks.main:  # prepared by nanoGPT or an earlier version
        try:
            dataset = replace(dataset, val_bytes=count_bytes(dataset.tokenizer, np.fromfile(path, dataset.dtype)))
        except DataError as error:
            print(f"bits per byte are unknown: {error}", file=sys.stderr)
    perplexity = float(torch.tensor(loss, dtype=torch.float64).exp())  # inf where math.exp overflows
    return {"tokens": count, "loss": loss, "perplexity": perplexity, "bits_per_byte": dataset.bits_per_byte(loss)}


def count_bytes(tokenizer: Tokenizer, ids: np.ndarray) -> int:
    """Bytes of UTF-8 text that ids stand for; the end of a text stands for none."""
    return len(tokenizer.decode(ids[ids != tokenizer.end_of_text].tolist()).encode(errors="replace"))


def clean(text: str) -> str:
    """Remove the marks in brackets, such as [header], of HellaSwag's texts from WikiHow; a [title] ends a sentence."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def read_item(line: bytes, tokenizer: Tokenizer, block_size: int) -> tuple[int, list[Ending]]:
    """The label and the endings. Raises ValueError."""
    item = json.loads(line)
    keys = ("ctx",) if isinstance(item, dict) and "activity_label" not in item else ORIGINAL
    if problems := check_types(item, {**dict.fromkeys(keys, str), "endings": list, "label": (int, str)}):
        raise ValueError("; ".join(problems))
    label, count = str(item["label"]), len(item["endings"])
    if not all(isinstance(ending, str) for ending in item["endings"]):
        raise ValueError("endings: must be strings")
    if not (label.isdecimal() and int(label) < count):
        raise ValueError(f"label = {label!r}: must be the number of one of its {count} endings, from 0")
    if keys == ORIGINAL:
        item["ctx"] = f"{item['activity_label']}: {item['ctx_a']} {item['ctx_b'].capitalize()}"
    context, endings = clean(item["ctx"]), []
    start = len(tokenizer.encode(context.rstrip()))  # a space that ends the context is part of the ending's first token
    for ending in map(clean, item["endings"]):
        ids = tokenizer.encode(f"{context} {ending}").tolist()
        scored = len(ids) - start
        if not (start and 1 <= scored <= block_size):
            rule = f"a context needs 1 or more, an ending 1 to block_size = {block_size}"
            raise ValueError(f"{start} tokens of context and {scored} of an ending: {rule}")
        endings.append(Ending(ids[-block_size - 1 :], scored, len(ending)))
    return int(label), endings


def read_hellaswag(path: Path, tokenizer: Tokenizer, block_size: int) -> list[tuple[int, list[Ending]]]:
    items: list[tuple[int, list[Ending]]] = []
    try:
        with path.open("rb") as file:
            for line in file:
                items.append(read_item(line, tokenizer, block_size))
    except OSError as error:
        raise ConfigError(f"--file={path}: {error.strerror}; give JSON lines of HellaSwag") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{path}:{len(items) + 1}: {error}; fix the line or remove it") from None
    if not items:
        raise DataError(f"{path} is empty; give JSON lines of HellaSwag")
    return items


@torch.no_grad()
def log_likelihoods(model: GPT, endings: list[Ending], ranks: Ranks, batch_size: int) -> list[float]:
    """In nats, one for each ending, in their order. Endings of similar lengths share a batch. A collective."""
    order = sorted(range(len(endings)), key=lambda i: -len(endings[i].ids))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    mine: list[tuple[int, float]] = []
    for batch in ranks.progress(batches[ranks.rank :: ranks.world_size], "evaluating"):
        rows = [endings[i] for i in batch]
        ids = pad_sequence([torch.tensor(row.ids) for row in rows], batch_first=True)
        scored = [torch.arange(len(row.ids)) >= len(row.ids) - row.scored for row in rows]
        ids, mask = ids.to(ranks.device), pad_sequence(scored, batch_first=True)[:, 1:].to(ranks.device)
        logits = model.lm_head(model.transformer(ids[:, :-1], None)[mask])
        losses = F.cross_entropy(logits.float(), ids[:, 1:][mask], reduction="none").cpu().double()
        mine += zip(batch, [-part.sum().item() for part in losses.split([r.scored for r in rows])], strict=True)
    return [value for _, value in sorted(pair for pairs in ranks.share(mine) for pair in pairs)]


def accuracies(items: list[tuple[int, list[Ending]]], scores: list[float]) -> dict[str, Any]:
    """acc and acc_norm, with their standard errors."""
    right, remaining = {"acc": 0, "acc_norm": 0}, iter(scores)
    for label, endings in items:
        sums = [next(remaining) for _ in endings]
        means = [s / e.characters if e.characters else -math.inf for s, e in zip(sums, endings, strict=True)]
        right["acc"] += sums.index(max(sums)) == label
        right["acc_norm"] += means.index(max(means)) == label
    result: dict[str, Any] = {"items": len(items)}
    for name, number in right.items():
        share = number / len(items)
        result |= {name: share, f"{name}_stderr": math.sqrt(share * (1 - share) / max(1, len(items) - 1))}
    return result


def open_model(args: Namespace) -> tuple[SavedState, Metadata, Dataset | None]:
    """The weights, and the data set that gives the loss or the tokenizer; None if neither is needed."""
    source, best = args.source, Path(args.source, "best")
    if args.best and not best.is_file():
        raise ConfigError(f"--best: there is no {best}; give a run folder")
    if args.best:
        source = str(Path(source, "checkpoints", best.read_text().strip()))
    saved, metadata = open_source(source)
    if not args.dataset and args.task == "hellaswag" and metadata["tokenizer"]:
        return saved, metadata, None
    if not (name := args.dataset or metadata["settings"].get("dataset")):
        raise ConfigError(f"{source} does not say on which data it was trained; give --dataset")
    dataset = open_dataset(DATA_FOLDER / name)
    if dataset.tokens["val"] < 2:
        raise DataError(f"{dataset.path('val')} has 1 token, from which none is predicted; prepare more text")
    return saved, add_tokenizer(metadata, dataset.tokenizer.describe()), dataset


def evaluate(args: Namespace, ranks: Ranks) -> dict[str, Any]:
    """A collective."""
    with ranks.together():
        dtype = distributed.pick_dtype(args.dtype, ranks.device)
        saved, metadata, dataset = open_model(args)
        config, items = GPTConfig(**metadata["model"]), []
        if args.file:
            tokenizer = tokenizer_from(metadata["tokenizer"], dataset.folder if dataset else Path(metadata["folder"]))
            items = read_hellaswag(args.file, tokenizer, config.block_size)
        with ranks.device:
            model = GPT(config).eval()
        saved.into(model)
    with torch.autocast(ranks.device.type, dtype, enabled=dtype != torch.float32):
        if dataset and not items:
            result = {"dataset": str(dataset.folder), **evaluate_loss(model, dataset, ranks, args.batch_size)}
        else:
            endings = [ending for _, each in items for ending in each]
            scores = log_likelihoods(model, endings, ranks, args.batch_size)
            result = {"file": str(args.file), **accuracies(items, scores)}
    return {"model": str(saved.folder), "step": metadata["step"], "task": args.task, **result}


def main() -> None:
    parser = make_parser("evaluate", __doc__)
    add = parser.add_argument
    add("source", metavar="RUN", help="run folder, or other weights")
    add("--best", action="store_true", help="the run's checkpoint with the lowest validation loss, not the newest")
    add("--task", choices=("loss", "hellaswag"), default="loss", help="default: loss")
    add("--dataset", default="", help="data set of the loss, or tokenizer of weights without one; default: the run's")
    add("--file", type=Path, help="JSON lines of HellaSwag")
    add("--batch_size", type=int, default=8, help="sequences in a forward pass (default: 8)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--dtype", choices=distributed.DTYPES, default="auto", help="of matmuls; default: auto")
    add("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    if (args.task == "hellaswag") != bool(args.file):
        raise ConfigError(f"--task={args.task}, --file={args.file}: hellaswag needs --file=FILE.jsonl, loss reads none")
    if args.batch_size < 1:
        raise ConfigError(f"--batch_size={args.batch_size}: must be at least 1")
    with distributed.start(args.device, "auto") as ranks:
        result = evaluate(args, ranks)
        if ranks.main:
            lines = {name: f"{value:.4f}" if isinstance(value, float) else value for name, value in result.items()}
            print(json.dumps(result) if args.json else "\n".join(f"{key:<16}{value}" for key, value in lines.items()))


if __name__ == "__main__":
    distributed.run(main)
