"""tools.evaluate: loss, bits per byte and HellaSwag's accuracy, as the definitions and `transformers` have them."""

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from data.dataset import open_dataset
from data.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer
from model import GPT, GPTConfig
from tests.running import message, prepare, rows, run
from tools.convert_read import open_source
from tools.evaluate import count_bytes, log_likelihoods, read_hellaswag
from training.distributed import SINGLE_PROCESS

BLOCK_SIZE = 64
TEXT = "naïve café — 漢字 🎉 can't\n\n"
WORDS = """the a dog runs quickly into water she smiles café don't stops. it's a knife; pour milk slowly (12)"""


def evaluate(source: Path, *options: str, ranks: int = 0, **settings: Any) -> dict[str, Any]:
    done = run("-m", "tools.evaluate", str(source), "--json", *options, ranks=ranks, device="cpu", **settings)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def write_items(path: Path, items: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


@torch.no_grad()
def test_the_loss_is_that_of_every_token_on_any_number_of_ranks(reference, make_data):
    """Data that other code prepared lacks the number of bytes; the last window is shorter than the others."""
    folder = make_data(np.random.default_rng(0).integers(97, 123, 5003))
    saved, about = open_source(str(reference()))
    model = GPT(GPTConfig(**about["model"])).eval()
    saved.into(model)
    ids = torch.from_numpy(np.fromfile(folder / "val.bin", "<u2").astype(np.int64))
    starts = range(0, len(ids) - 1, 32)
    windows = [(ids[start : start + 33][:-1], ids[start : start + 33][1:]) for start in starts]
    nats = sum(model(i[None], t[None]).item() * len(t) for i, t in windows)
    one = evaluate(reference(), dataset=folder)
    two = evaluate(reference(), ranks=2, dataset=folder)
    assert one["tokens"] == 5002 and abs(one["loss"] - nats / 5002) < 1e-6
    assert math.isclose(one["bits_per_byte"], one["loss"] / math.log(2), rel_tol=1e-12)
    assert math.isclose(one["perplexity"], math.exp(one["loss"]), rel_tol=1e-12)
    for key in ("tokens", "loss", "perplexity", "bits_per_byte"):
        assert math.isclose(one[key], two[key], rel_tol=1e-12), key


def test_a_run_logs_bits_per_byte_and_is_evaluated_on_its_own_data(reference, data):
    folder, dataset = reference(eval_interval=10), open_dataset(data)
    ends = int((np.fromfile(data / "val.bin", "<u2") == 256).sum())
    assert dataset.val_bytes == dataset.tokens["val"] - ends and ends == 400
    evaluations = rows(folder, "eval")
    for row in evaluations:
        bits = row["val_loss"] / math.log(2) * dataset.tokens["val"] / dataset.val_bytes
        assert math.isclose(row["val_bpb"], bits, rel_tol=1e-9)
    newest, best = evaluate(folder), evaluate(folder, "--best")
    assert newest["step"] == 30 and best["step"] == min(evaluations, key=lambda row: row["val_loss"])["step"]
    assert abs(newest["loss"] - evaluations[-1]["val_loss"]) < 0.1, "the run takes a sample"
    assert math.isclose(newest["bits_per_byte"], dataset.bits_per_byte(newest["loss"]) or 0)
    lines = dict(line.split() for line in run("-m", "tools.evaluate", str(folder)).stdout.splitlines())
    assert lines["loss"] == f"{newest['loss']:.4f}" and lines["bits_per_byte"] == f"{newest['bits_per_byte']:.4f}"


@pytest.mark.parametrize(
    "tokenizer", [ByteTokenizer(), CharTokenizer(TEXT), BPETokenizer("gpt2")], ids=lambda t: t.name
)
def test_tokens_have_the_bytes_of_their_text(tokenizer, bpe_files):
    ids = tokenizer.encode(TEXT * 100)
    assert count_bytes(tokenizer, ids) == len(TEXT.encode()) * 100
    if tokenizer.end_of_text is not None:
        assert count_bytes(tokenizer, np.append(ids, tokenizer.end_of_text)) == len(TEXT.encode()) * 100


def test_prepared_data_knows_its_bytes(tmp_path, bpe_files):
    """A whole file of text, split by position; without its description's number, the tool counts them itself."""
    (tmp_path / "text.txt").write_text(TEXT * 200)
    prepare("text", "--input", tmp_path / "text.txt", "--name", "made", "--out", tmp_path / "made")
    ids = np.fromfile(tmp_path / "made" / "val.bin", "<u2")
    text = BPETokenizer("gpt2").decode(ids.tolist()).replace("<|endoftext|>", "")
    assert open_dataset(tmp_path / "made").val_bytes == len(text.encode()) > 500
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, n_positions=16)).save_pretrained(tmp_path / "gpt2")
    first = evaluate(tmp_path / "gpt2", dataset=tmp_path / "made")
    about = json.loads((tmp_path / "made" / "meta.json").read_text())
    del about["val_bytes"]
    (tmp_path / "made" / "meta.json").write_text(json.dumps(about))
    assert evaluate(tmp_path / "gpt2", dataset=tmp_path / "made") == first
    settings: dict[str, Any] = {"dataset": tmp_path / "made", "env": {"TIKTOKEN_CACHE_DIR": str(tmp_path / "none")}}
    settings["env"] |= {"https_proxy": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9"}
    without = evaluate(tmp_path / "gpt2", **settings)
    assert without == {**first, "bits_per_byte": None}, "the loss needs no BPE file"


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> tuple[Path, Any]:
    """A random GPT-2 of `transformers` that has all of its ids, and the folder in which it was saved."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": BLOCK_SIZE}
    model = GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.2)).eval()
    folder = tmp_path_factory.mktemp("theirs") / "gpt2"
    model.save_pretrained(folder)
    return folder, model


def made_items() -> list[tuple[dict[str, Any], str, list[str]]]:
    """(item, its context, its endings without marks): all that the texts of HellaSwag have, and long contexts."""
    draw = random.Random(0)

    def text(most: int) -> str:
        return " ".join(draw.choice(WORDS.split()) for _ in range(draw.randint(1, most)))

    items = []
    for number in range(30):
        a, b, label = text(100 if number % 5 == 0 else 20), text(5), draw.randrange(4)
        endings = cleaned = [text(12) for _ in range(4)]
        item: dict[str, Any] = {"activity_label": "Baking", "ctx_a": a, "ctx_b": b.upper(), "label": label}
        context = f"Baking: {a} {b.capitalize()}"
        if number % 3 == 0:  # prepared by others
            item, context = {"ctx": f"{a} {b}", "label": str(label)}, f"{a} {b}"
        elif number % 3 == 1:  # from WikiHow, with a context that ends with a space
            item |= {"ctx_a": f"[header] {a} [title] {a}", "ctx_b": "[step]", "ctx": "not read"}
            context = f"Baking: {a}. {a} "
            endings = [f" [step] {endings[0]}", f"{endings[1]} [title] {endings[2]}", *endings[2:]]
            cleaned = [f" {cleaned[0]}", f"{cleaned[1]}. {cleaned[2]}", *cleaned[2:]]
        items.append(({**item, "endings": endings}, context, cleaned))
    return items


@torch.no_grad()
def test_hellaswag_is_that_of_a_model_of_transformers(gpt2, tmp_path, bpe_files):
    """Each log-likelihood; and both accuracies, on one rank and two, from its folder."""
    folder, theirs = gpt2
    items, tokenizer = made_items(), BPETokenizer("gpt2")
    file = write_items(tmp_path / "items.jsonl", [item for item, _, _ in items])
    expected, right = [], np.zeros(2)
    for item, context, endings in items:
        sums = []
        for ending in endings:
            ids = torch.from_numpy(tokenizer.encode(f"{context} {ending}").astype(np.int64))
            scored = len(ids) - len(tokenizer.encode(context.rstrip()))
            ids = ids[-BLOCK_SIZE - 1 :]
            losses = F.cross_entropy(theirs(ids[None, :-1]).logits[0], ids[1:], reduction="none")
            sums.append(-losses[-scored:].sum().item())
        expected += sums
        means = np.array(sums) / [len(ending) for ending in endings]
        right += [np.argmax(sums) == int(item["label"]), np.argmax(means) == int(item["label"])]
    saved, about = open_source(str(folder))
    model = GPT(GPTConfig(**about["model"])).eval()
    saved.into(model)
    read = read_hellaswag(file, tokenizer, BLOCK_SIZE)
    found = log_likelihoods(model, [ending for _, endings in read for ending in endings], SINGLE_PROCESS, 8)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert any(len(ending.ids) == BLOCK_SIZE + 1 for _, endings in read for ending in endings), "no context was cut"
    one, two = (evaluate(folder, ranks=ranks, task="hellaswag", file=file) for ranks in (0, 2))
    assert one == two and one["items"] == 30
    assert [one["acc"], one["acc_norm"]] == pytest.approx(right / 30)
    p = one["acc"]
    assert 0 < p < 1 and one["acc_stderr"] == pytest.approx(np.sqrt(p * (1 - p) / 29))


GOOD = {"ctx": "A dog", "endings": ["runs.", "sits."], "label": 1}


@pytest.mark.parametrize(
    "line, told",
    [
        ("{", "Expecting property name"),
        ("[1]", "must be an object, not [1]"),
        (json.dumps({**GOOD, "ctx": 5}), "ctx = 5: must be a string"),
        (json.dumps({**GOOD, "activity_label": "Running"}), "'ctx_a' is missing; 'ctx_b' is missing"),
        (json.dumps({**GOOD, "label": ""}), "label = '': must be the number of one of its 2 endings, from 0"),
        (json.dumps({**GOOD, "label": 2}), "label = '2': must be the number of one of its 2 endings, from 0"),
        (json.dumps({**GOOD, "endings": ["runs.", None]}), "endings: must be strings"),
        (json.dumps({**GOOD, "ctx": " "}), "0 tokens of context and 6 of an ending: a context needs 1 or more"),
        (json.dumps({**GOOD, "endings": ["x" * 40, "y"]}), "an ending 1 to block_size = 32"),
        ('{"ctx": "\\ud800", "endings": ["a", "b"], "label": 1}', "surrogates not allowed"),
    ],
)
def test_a_malformed_line_is_named(reference, tmp_path, line, told):
    file = write_items(tmp_path / "items.jsonl", [GOOD, GOOD])
    file.write_text(f"{file.read_text()}{line}\n{json.dumps(GOOD)}\n")
    ranks = 2 if line == "{" else 0
    done = run("-m", "tools.evaluate", str(reference()), ranks=ranks, device="cpu", task="hellaswag", file=file)
    text = message(done)
    assert text.startswith(f"{file}:3: ") and told in text and text.endswith("; fix the line or remove it")
    assert text.count("\n") == 0 and not done.stdout


@pytest.mark.parametrize(
    "settings, told",
    [
        ({"task": "hellaswag"}, "--task=hellaswag, --file=None: hellaswag needs --file=FILE.jsonl"),
        ({"file": "x"}, "--task=loss, --file=x: hellaswag needs"),
        ({"task": "hellaswag", "file": "none.jsonl"}, "--file=none.jsonl: No such file or directory"),
        ({"task": "hellaswag", "file": "/dev/null"}, "/dev/null is empty; give JSON lines of HellaSwag"),
        ({"batch_size": 0}, "--batch_size=0: must be at least 1"),
        ({"dataset": "shakespear"}, "data/shakespear; did you mean shakespeare?"),
        ({"dtype": "float64"}, "invalid choice: 'float64'"),
    ],
)
def test_a_wrong_option_is_one_message(reference, settings, told):
    done = run("-m", "tools.evaluate", str(reference()), device="cpu", **settings)
    assert done.returncode == 2 and told in done.stderr and "Traceback" not in done.stderr


def test_a_source_without_a_model_or_data_is_one_message(reference, make_data, tmp_path):
    assert "does not exist or is of no known format" in message(run("-m", "tools.evaluate", str(tmp_path / "none")))
    text = message(run("-m", "tools.evaluate", str(tmp_path), "--best"))
    assert text == f"--best: there is no {tmp_path / 'best'}; give a run folder"
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, n_positions=16)).save_pretrained(tmp_path / "gpt2")
    assert "give --dataset" in message(run("-m", "tools.evaluate", str(tmp_path / "gpt2")))
    characters = make_data(range(100), 100, "characters")
    text = message(run("-m", "tools.evaluate", str(reference()), dataset=characters))
    assert text == "the source was trained with the tokenizer 'byte', not 'char'"
    text = message(run("-m", "tools.evaluate", str(reference()), dataset=make_data([5], 257, "short")))
    assert "has 1 token, from which none is predicted" in text
    damaged = make_data([5, 6, 7, 257], 257, "damaged")
    assert "contains id 257, outside its vocabulary" in message(
        run("-m", "tools.evaluate", str(reference()), dataset=damaged)
    )
