"""Convert checkpoints and weights between formats, and verify the result.

    python -m tools.convert out-gpt2-zero3 gpt2.safetensors
    python -m tools.convert out-gpt2 gpt2-mine --to=hf --dtype=bfloat16
    python -m tools.convert nanoGPT/out/ckpt.pt out-from-nanogpt --to=train

docs/convert.md lists what can be read. A target is one file (safetensors), a folder for transformers (hf), a ckpt.pt
(nanogpt), or a run folder that either train script resumes under any strategy (train).
"""

import json
import math
import shutil
import signal
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import tiktoken.load
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file

from data.dataset import DATA_FOLDER, open_dataset
from data.errors import DataError
from data.hf_tokenizer import TOKENIZER_FILE
from data.tokenizer import END_OF_TEXT, BPETokenizer, copy_files, tokenizer_from
from model import GPT, GPTConfig
from tools.convert_read import ADAMW_KINDS, HEADER, MODEL_ARGS, NANOGPT_FILE, Metadata, open_source, recognize
from tools.terminal import make_parser
from training import distributed
from training.checkpoint import Checkpoints, Saver, save, sync
from training.config import TrainConfig
from training.errors import ConfigError, UserError
from training.families import family_of, is_gpt2, is_transposed, their_parameters, to_huggingface
from training.model_state import TIED, WEIGHT, SavedState, model_shapes
from training.optim import make_optimizer
from training.pretrained import WEIGHTS

WEIGHTS_ONLY = ("safetensors", "hf", "hf-mistral")  # without optimizer states, and of any dtype
MAX_SHARD_BYTES = 5 * 10**9  # of a file of weights in hf, one of which is in memory
OPENAI = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main"
GPT2_TOKENIZER = {"vocab.json": f"{OPENAI}/encoder.json", "merges.txt": f"{OPENAI}/vocab.bpe"}


def convert(
    source: str, target: Path, to: str, dtype: str = "float32", tokenizer: Metadata | None = None, force: bool = False
) -> list[str]:
    """Write source to target in a format of WRITERS, verify it, and return lines to print.

    tokenizer: as in open_source. force: overwrite the target. Raises UserError, and leaves no target, on any failure.
    """
    check_target(Path(source), target, force)
    if dtype != "float32" and to not in WEIGHTS_ONLY:
        raise ConfigError(f"--to={to} stores weights in float32, because AdamW updates those; omit --dtype")
    saved, metadata = open_source(source, tokenizer)
    if to == "train" and metadata["tokenizer"] is None:
        raise ConfigError(f"{source} does not say which tokenizer it was trained with; give its --dataset")
    saved, notes = match_optimizer_state(saved, to)
    scratch = target.with_name(f".{target.name}.unfinished")
    shutil.rmtree(scratch, ignore_errors=True)  # left by a killed conversion
    unfinished = scratch / f"new{target.suffix}"
    try:
        scratch.mkdir()
        WRITERS[to](saved, metadata, unfinished, dtype)
        if to.startswith("hf"):
            notes += write_tokenizer(metadata, unfinished)
        compare_tensors(saved, open_source(str(unfinished), metadata["tokenizer"])[0], getattr(torch, dtype))
        for path in [unfinished, *unfinished.rglob("*")]:
            sync(path)
        if target.is_dir():  # a folder cannot be replaced in one step
            target.rename(scratch / "replaced")
        unfinished.replace(target)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{target}: {getattr(error, 'strerror', None) or error}; nothing was written") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    count = GPTConfig(**metadata["model"]).parameter_count()
    return [f"{target}: {count:,} parameters of {saved.folder}, {dtype}", *notes, "verified: every tensor equal"]


def match_optimizer_state(saved: SavedState, to: str) -> tuple[SavedState, list[str]]:
    """Drop an optimizer state that the format cannot hold; return notes for the user."""
    if to in WEIGHTS_ONLY:
        notes = ["the optimizer state is left out: the format stores weights only"] if saved.kinds else []
    elif saved.kinds and (to == "train" or set(saved.kinds) == set(ADAMW_KINDS)):
        return saved, []
    else:
        notes = ["AdamW starts at step 0 with zero moments: the source has no state of it"]
    weights = {(name, kind): pieces for (name, kind), pieces in saved.pieces.items() if kind == WEIGHT}
    return replace(saved, pieces=weights, step=None), notes


def check_target(source: Path, target: Path, force: bool) -> None:
    """Raises ConfigError if the target must not be written."""
    here, there = source.resolve(), target.resolve()
    if source.exists() and (here.is_relative_to(there) or there.is_relative_to(here)):
        raise ConfigError(f"{target}: must be outside the source {source}, and must not contain it")
    if target.exists() and not force:
        raise ConfigError(f"{target} exists; --force overwrites it")
    if target.is_dir() and any(target.iterdir()) and recognize(target) is None:
        raise ConfigError(f"{target} is a folder without weights, which --force does not overwrite; remove it yourself")


def compare_tensors(saved: SavedState, again: SavedState, dtype: torch.dtype) -> None:
    """Compare weights, rounded to dtype, and optimizer states. Biases that only the target has must be zero."""
    failed = "verification failed, so nothing was written; try again, or on another disk:"
    if saved.kinds and saved.step != again.step:
        raise UserError(f"{failed} the optimizer has made {again.step} steps, not {saved.step}")
    for name, kind in {**again.pieces, **saved.pieces}:
        expected = saved.whole(name, kind) if name in saved.shapes else torch.zeros(again.shapes[name])
        if not math.isfinite(torch.linalg.vector_norm(expected, math.inf)):  # needs no mask as large as the tensor
            raise UserError(f"{saved.folder}: the {kind} of {name} has NaN or inf; convert an earlier checkpoint")
        expected, actual = expected.to(dtype).float(), again.whole(name, kind)
        if expected.shape != actual.shape or not torch.equal(expected.view(torch.int32), actual.view(torch.int32)):
            raise UserError(f"{failed} the {kind} of {name} differs")


def write_run(saved: SavedState, metadata: Metadata, target: Path, dtype: str) -> None:
    """Write a run folder with one checkpoint, as train.py in one process does."""
    # Copied, because torch.save writes all of the mapped file that a tensor is a part of.
    weights = {name: saved.whole(name).clone() for name in saved.shapes}
    step = {} if saved.step is None else {"step": torch.tensor(saved.step)}
    states = {n: step | {kind: saved.whole(n, kind).clone() for kind in saved.kinds_of(n)} for n in weights}
    target.mkdir(exist_ok=True)
    if metadata["tokenizer"]:
        copy_files(tokenizer_from(metadata["tokenizer"], Path(metadata["folder"])), target)
    metadata = {**metadata, "strategy": "single", "world_size": 1, "dtype": "float32"}
    del metadata["folder"]
    if not saved.kinds:
        del metadata["optimizer"]  # any may begin
    with Saver(Checkpoints(str(target))).writing(metadata, best=False) as files:
        files.write("model.pt", weights)
        files.write("optimizer.pt", {"optimizer": states, "scaler": saved.scaler})


def write_nanogpt(saved: SavedState, metadata: Metadata, target: Path, dtype: str) -> None:
    """Write nanoGPT's ckpt.pt, to a target named *.pt or into the folder target, as in nanoGPT's out_dir."""
    path = target if target.suffix == ".pt" else target / NANOGPT_FILE
    path.parent.mkdir(exist_ok=True)
    config = GPTConfig(**metadata["model"])
    if family_of(config) != "gpt2" or config.n_hidden != 4 * config.n_embd:
        raise ConfigError("--to=nanogpt: nanoGPT has the model of GPT-2 only; use --to=hf")
    model = GPT(config)
    optimizer = make_optimizer(model, TrainConfig(**metadata["settings"]))
    saved.into(model, optimizer)
    for group in optimizer.param_groups:
        group["fused"] = None  # nanoGPT sets it for GPUs alone
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "model_args": {key: metadata["model"][key] for key in MODEL_ARGS},
        "iter_num": metadata["step"],
        "best_val_loss": metadata["best_val_loss"] or 1e9,  # 1e9: where nanoGPT starts
        "config": metadata["settings"],
    }
    with path.open("wb") as file:
        save(state, file, crc32=True)


def write_weights(saved: SavedState, metadata: Metadata, target: Path, dtype: str) -> None:
    """Write one safetensors file whose header holds the metadata, so that it can be read back."""
    tensors = {name: cast(name, saved.whole(name), getattr(torch, dtype)) for name in saved.shapes}
    if metadata["model"]["tied"]:
        tensors[TIED] = tensors["transformer.wte.weight"].clone()  # other readers may not know that they are tied
    save_file(tensors, target, {key: json.dumps(metadata[key]) for key in HEADER if key in metadata})


def cast(name: str, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Raises UserError if a weight is too large for dtype."""
    largest = torch.linalg.vector_norm(weight, math.inf).item()
    if torch.finfo(dtype).max < largest < math.inf:
        raise UserError(f"{name} has values up to {largest:.1e}, too large for {dtype}; use float32")
    return weight.to(dtype).contiguous()


def write_huggingface(saved: SavedState, metadata: Metadata, target: Path, dtype: str, mistral=False) -> None:
    """Write a folder for AutoModelForCausalLM and AutoTokenizer."""
    config = GPTConfig(**metadata["model"])
    about = to_huggingface(config, mistral)
    target.mkdir()
    write_shards(saved, config, target, getattr(torch, dtype))
    tokenizer, padding = metadata["tokenizer"], list(range(metadata["vocab_size"], config.vocab_size))
    end_of_text = tokenizer_from(tokenizer).end_of_text if tokenizer else None
    special = {"bos_token_id": end_of_text, "eos_token_id": end_of_text}
    (target / "config.json").write_text(json.dumps({**about, "torch_dtype": dtype, **special}, indent=2))
    (target / "generation_config.json").write_text(json.dumps({**special, "suppress_tokens": padding or None}))


def write_shards(saved: SavedState, config: GPTConfig, target: Path, dtype: torch.dtype) -> None:
    """Write the weights in Hugging Face's layout, one file at a time, and their index if there are several."""
    config = replace(config, bias=is_gpt2(config))  # a GPT-2 of theirs always has biases: ours may be zero
    sources: dict[str, tuple[str, int, int]] = {}  # their name -> ours, first row, end
    empty = {}
    for name, shape in model_shapes(config).items():
        start = 0
        for theirs, rows in their_parameters(name, config).items():
            end = shape[0] if rows is None else start + rows
            sources[theirs] = name, start, end
            empty[theirs] = torch.empty((end - start, *shape[1:]), dtype=dtype, device="meta")
            start = end
    split = split_torch_state_dict_into_shards(empty, max_shard_size=MAX_SHARD_BYTES)
    for file, names in split.filename_to_tensors.items():
        tensors = {}
        for theirs in names:
            name, start, end = sources[theirs]
            weight = saved.whole(name)[start:end] if name in saved.shapes else torch.zeros(empty[theirs].shape)
            tensors[theirs] = cast(name, weight.t() if is_transposed(name, config) else weight, dtype)
        save_file(tensors, target / file, {"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (target / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


def write_tokenizer(metadata: Metadata, folder: Path) -> list[str]:
    """Write the tokenizer as AutoTokenizer reads it; return notes for the user."""
    name = (metadata["tokenizer"] or {"name": "unknown"})["name"]
    if name == TOKENIZER_FILE:
        copy_files(tokenizer_from(metadata["tokenizer"], Path(metadata["folder"])), folder)
        return [] if (folder / name).exists() else [f"no tokenizer files were written: {name} was not found"]
    if name != "gpt2":
        return [f"no tokenizer files were written: only those of gpt2 are, and the ids are of {name}"]
    try:
        _ = BPETokenizer("gpt2").encoding  # downloads OpenAI's files into tiktoken's cache, and checks them
    except DataError as error:
        return [f"no tokenizer files were written: {error}"]
    for name, url in GPT2_TOKENIZER.items():
        (folder / name).write_bytes(tiktoken.load.read_file_cached(url))
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    settings = {"model_max_length": metadata["model"]["block_size"], "tokenizer_class": "GPT2Tokenizer", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return []


WRITERS: dict[str, Any] = {"safetensors": write_weights, "hf": write_huggingface}
WRITERS |= {"hf-mistral": partial(write_huggingface, mistral=True), "nanogpt": write_nanogpt, "train": write_run}


def main() -> None:
    parser = make_parser("convert", __doc__)
    add = parser.add_argument
    add("source", help="path or hub name to read")
    add("target", type=Path, help="file or folder to write")
    add("--to", choices=WRITERS, default="safetensors", help="format to write (default: safetensors)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of safetensors and hf")
    add("--dataset", help="prepared data set, whose tokenizer is that of a source that does not name one")
    add("--force", action="store_true", help="overwrite the target")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # leaves nothing, as an error does
    tokenizer = open_dataset(DATA_FOLDER / args.dataset).tokenizer.description if args.dataset else None
    print(*convert(args.source, args.target, args.to, args.dtype, tokenizer, args.force), sep="\n  ")


if __name__ == "__main__":
    distributed.run(main)
