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
class Text:
    """At most block_size + 1 ids, of which the last `scored` ones are predicted. characters: of HellaSwag's ending."""

    ids: list[int] | np.ndarray
    scored: int
    characters: int = 0


@torch.no_grad()
def log_likelihoods(model: GPT, texts: list[Text], ranks: Ranks, batch_size: int) -> list[float]:
    """In nats, one for each text, in their order. Texts of similar lengths share a batch. A collective."""
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i].ids))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    mine: list[tuple[int, float]] = []
    for batch in ranks.progress(batches[ranks.rank :: ranks.world_size], "evaluating"):
        rows = [torch.from_numpy(np.array(texts[i].ids, np.int64)) for i in batch]
        ids = pad_sequence(rows, batch_first=True).to(ranks.device)
        states = model.transformer(ids[:, :-1], None)
        losses = []  # means
        for i, state, targets in zip(batch, states, ids[:, 1:], strict=True):
            scored = slice(len(texts[i].ids) - 1 - texts[i].scored, len(texts[i].ids) - 1)
            losses.append(model.loss(model.lm_head(state[scored]), targets[scored]))
        mine += [(i, -loss * texts[i].scored) for i, loss in zip(batch, torch.stack(losses).tolist(), strict=True)]
    return [value for _, value in sorted(pair for pairs in ranks.share(mine) for pair in pairs)]


def evaluate_loss(model: GPT, dataset: Dataset, ranks: Ranks, batch_size: int) -> dict[str, Any]:
    """Mean over val.bin in consecutive windows, the last of which may be shorter. A collective."""
    count, width = dataset.tokens["val"] - 1, model.config.block_size
    ids = np.memmap(dataset.path("val"), dataset.dtype, "r")
    texts = [Text(ids[start : start + width + 1], min(width, count - start)) for start in range(0, count, width)]
    loss = -sum(log_likelihoods(model, texts, ranks, batch_size)) / count
    if not dataset.val_bytes and ranks.main:  # prepared by nanoGPT or an earlier version
        try:
            dataset = replace(dataset, val_bytes=count_bytes(dataset.tokenizer, ids))
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


def read_item(line: bytes, tokenizer: Tokenizer, block_size: int) -> tuple[int, list[Text]]:
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
        endings.append(Text(ids[-block_size - 1 :], scored, len(ending)))
    return int(label), endings


def read_hellaswag(path: Path, tokenizer: Tokenizer, block_size: int) -> list[tuple[int, list[Text]]]:
    items: list[tuple[int, list[Text]]] = []
    try:
        for line in path.read_bytes().splitlines():
            items.append(read_item(line, tokenizer, block_size))
    except OSError as error:
        raise ConfigError(f"--file={path}: {error.strerror}; give JSON lines of HellaSwag") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{path}:{len(items) + 1}: {error}; fix the line or remove it") from None
    if not items:
        raise DataError(f"{path} is empty; give JSON lines of HellaSwag")
    return items


def accuracies(items: list[tuple[int, list[Text]]], scores: list[float]) -> dict[str, Any]:
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
    path = dataset.path("val")
    if dataset.tokens["val"] < 2:
        raise DataError(f"{path} has 1 token, from which none is predicted; prepare more text")
    if args.task == "loss" and (largest := np.memmap(path, dataset.dtype, "r").max()) >= dataset.vocab_size:
        raise DataError(f"{path} contains id {largest}, outside its vocabulary; prepare it again")
    return saved, add_tokenizer(metadata, dataset.tokenizer.description), dataset


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
