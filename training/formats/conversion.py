"""From any format to any other: read by the piece, written beside the target, read back, compared, moved there."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from model import GPTConfig
from training.errors import ConfigError, UserError
from training.formats import fit, huggingface, nanogpt, run, source, target, universal, verify, weights_file, zero
from training.formats.options import Options
from training.formats.reading import Reading
from training.model_state import SavedState

FORMATS: dict[str, Any] = {
    **{"safetensors": weights_file, "hf": huggingface, "nanogpt": nanogpt},
    **{"train": run, "deepspeed": zero, "universal": universal},
}
RUNS = ("train", "deepspeed")  # resumed by scripts that ask for the tokenizer
ANY_DTYPE = ("safetensors", "hf")  # the others hold weights in fp32


def convert(origin: str, goal: Path, to: str, options: Options, force: bool = False) -> list[str]:
    """Returns what there is to say: what was written, what stays behind, what was compared.

    Raises UserError, with nothing written, for whatever cannot be.
    """
    check(to, options)
    target.check(Path(origin), goal, force)
    saved, about = source.open_source(origin, options)
    if to in RUNS:
        source.need_tokenizer(about, origin)
    if options.vocab is not None:
        saved, about = fit.cut(saved, about, options.vocab)
    form = FORMATS[to]
    notes = list(moments(saved, form.KINDS))
    saved = saved.with_moments() if len(form.KINDS) > 1 else saved
    try:
        with target.writing(goal) as unfinished:
            with reading(saved, "writing", len(form.KINDS)) as watched:
                notes += form.write(watched, about, unfinished, options)
            notes += compare(saved, about, unfinished, to, options)
            size = sum(path.stat().st_size for path in [unfinished, *unfinished.rglob("*")] if path.is_file())
    except OSError as error:
        raise UserError(f"{goal}: {error.strerror or error}; nothing was written") from None
    return [summary(goal, saved, about, options.dtype, size), *notes]


def check(to: str, options: Options) -> None:
    if options.dtype != "float32" and to not in (*ANY_DTYPE, "deepspeed"):
        raise ConfigError(f"--dtype={options.dtype}: --to={to} holds float32, what AdamW updates; leave it out")
    if to == "deepspeed" and options.dtype == "float16":
        raise ConfigError("--dtype=float16: write float32; a run in float16 takes that, with a loss scale of its own")
    if to == "deepspeed" and not (1 <= options.stage <= 3 and options.ranks >= 1):
        raise ConfigError(f"--stage={options.stage} --ranks={options.ranks}: stages are 1 to 3, ranks 1 or more")


def moments(saved: SavedState, kinds: tuple[str, ...]) -> Iterator[str]:
    if len(kinds) > 1 and not saved.has_moments:
        yield "AdamW's moments are zero, and its steps 0, as of a fresh one: the source has none"
    if len(kinds) == 1 and saved.has_moments:
        yield "AdamW's moments stay behind: the format holds weights only"


@contextmanager
def reading(saved: SavedState, words: str, passes: int) -> Iterator[SavedState]:
    """saved, with a bar that shows how much was read of so many passes over all parameters, or moments of one kind."""
    total = passes * 4 * sum(shape.numel() for shape in saved.shapes.values())
    with tqdm(total=total, desc=words, unit="B", unit_scale=True, disable=None, leave=False) as bar:
        done = Reading(saved.folder, bar)
        yield replace(saved, done=done)
        done.let_go()


def compare(saved: SavedState, about: dict[str, Any], written: Path, to: str, options: Options) -> list[str]:
    """Raises UserError where the target does not hold what the source does."""
    if options.verify == "none":
        return ["not verified"]
    form = FORMATS[to]
    dtype = options.torch_dtype if to in ANY_DTYPE else torch.float32
    again, told = source.open_source(str(written), replace(options, tokenizer=about["tokenizer"]))
    again = replace(again, done=Reading(written))
    try:
        with reading(saved, "verifying", len(form.KINDS) + (options.verify == "logits")) as watched:
            verify.tensors(watched, again, form.KINDS, dtype)
            if options.verify == "tensors":
                return ["verified: every tensor equal"]
            if told["model"]["gelu"] != about["model"]["gelu"]:
                return ["verified: every tensor equal; logits not compared, as the GELU is another"]
            difference, largest = verify.logits_differ(
                watched, GPTConfig(**about["model"]), again, GPTConfig(**told["model"])
            )
    except verify.NotEqual as error:
        raise UserError(f"{written.name}: {error}; nothing was written: try again, on another disk") from None
    if dtype == torch.float32 and difference > verify.EPSILON * largest:
        raise UserError(f"{written.name}: logits differ by {difference:.1e}; nothing was written")
    return [
        f"verified: every tensor equal; logits of a random batch are {difference:.1e} apart at most, of {largest:.1f}"
    ]


def summary(goal: Path, saved: SavedState, about: dict[str, Any], dtype: str, size: int) -> str:
    count = GPTConfig(**about["model"]).parameter_count()
    return f"{goal}: {count:,} parameters of {saved.folder}, {dtype}, {size:,} bytes"
