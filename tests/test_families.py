"""Hugging Face's families: the logits of transformers, there and back; training; their tokenizers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from data.dataset import open_dataset
from model import GPT
from tests.checkpoints import greedy
from tests.running import difference, losses, message, prepare, refused, run, strategy_settings, train
from tools.convert import convert
from training import pretrained
from training.errors import UserError

SIZES: dict[str, Any] = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "max_position_embeddings": 64, "eos_token_id": None, "pad_token_id": None}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 16, "rope_theta": 500000.0}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama2": {"model_type": "llama", "num_key_value_heads": 4, "tie_word_embeddings": False},
    "llama3": {"model_type": "llama", "num_key_value_heads": 2, "tie_word_embeddings": False, "rope_scaling": LLAMA3},
    "smollm2": {"model_type": "llama", "num_key_value_heads": 2, "tie_word_embeddings": True, "rms_norm_eps": 1e-5},
    "mistral": {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 48},
    "qwen2.5": {"model_type": "qwen2", "num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": False},
}


def make(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """A random model of transformers, saved; biases and norms are random, too."""
    settings = {**SIZES, **FAMILIES[name]}
    torch.manual_seed(len(name))
    theirs: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings)).to(dtype).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    theirs.save_pretrained(folder, max_shard_size="40KB")
    return theirs


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("families")
    for name in FAMILIES:
        make(name, folder / name)
    return folder


@torch.no_grad()
def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    output = model(tokens)
    return output if isinstance(output, torch.Tensor) else output.logits[:, -1]


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_text_are_those_of_transformers_there_and_back(folders, tmp_path, name):
    theirs: Any = AutoModelForCausalLM.from_pretrained(folders / name).eval()
    assert (folders / name / "model.safetensors.index.json").exists(), "in several files"
    config, weights = pretrained.open_weights(str(folders / name))
    ours = GPT(config).eval()
    weights.into(ours)
    tokens = torch.randint(300, (2, 40), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ours(tokens), logits(theirs, tokens), rtol=1e-5, atol=1e-5)
    text = theirs.generate(tokens[:, :20], max_new_tokens=20, do_sample=False, use_cache=True)
    assert torch.equal(ours.generate(tokens[:, :20], 20, greedy), text)
    convert(str(folders / name), tmp_path / "hf", "hf-mistral" if name == "mistral" else "hf")
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    for key in ("model_type", "tie_word_embeddings"):
        assert getattr(again.config, key) == getattr(theirs.config, key)
    assert torch.equal(logits(again, tokens), logits(theirs, tokens)), "the same weights"


@pytest.mark.parametrize("name, activation_checkpointing", [("llama3", False), ("qwen2.5", True)])
def test_every_strategy_trains_them_as_one_process(folders, tmp_path, data, name, activation_checkpointing):
    settings = {"init_from": folders / name, "gradient_accumulation_steps": 2, "max_iters": 20, "learning_rate": 1e-4}
    settings |= {"activation_checkpointing": activation_checkpointing}
    train(tmp_path / "single", data, **settings)
    assert losses(tmp_path / "single")[19] < losses(tmp_path / "single")[0]
    for strategy in ("ddp", "fsdp", "zero2", "zero3", "zero3_offload"):
        (tmp_path / strategy).mkdir()
        own = strategy_settings(strategy, tmp_path / strategy)
        train(tmp_path / strategy / "run", data, ranks=2, **{**settings, **own})
        assert difference(tmp_path / strategy / "run", tmp_path / "single") < 1e-5, strategy


def test_a_run_goes_to_transformers_and_on_with_resume(folders, tmp_path, data):
    train(tmp_path / "run", data, init_from=folders / "qwen3", max_iters=3)
    convert(str(tmp_path / "run"), tmp_path / "hf", "hf")
    theirs: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    config, weights = pretrained.open_weights(str(tmp_path / "hf"))
    ours = GPT(config).eval()
    weights.into(ours)
    tokens = torch.randint(257, (2, 30))
    torch.testing.assert_close(ours(tokens), logits(theirs, tokens), rtol=1e-5, atol=1e-5)
    assert theirs.config.model_type == "qwen3"
    train(tmp_path / "run", data, init_from="resume", max_iters=5)
    assert len(losses(tmp_path / "run")) == 5


@pytest.mark.parametrize(
    "change, told",
    [
        ({"model_type": "lama"}, "model_type = 'lama': must be one of gpt2, llama, mistral, qwen2, qwen3; did you"),
        ({"model_type": "mixtral", "num_local_experts": 8}, "model_type = 'mixtral': must be one of"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu': only models with hidden_act = 'silu' can be read"),
        ({"attention_bias": True}, "attention_bias = True: only models with attention_bias = False can be read"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type = 'yarn': only models with rope_type"),
        ({"num_hidden_layers": None}, "num_hidden_layers = None: must be an integer"),
        ({"intermediate_size": 88}, "mlp.c_fc.weight is (160, 32), the model's config says (176, 32)"),
    ],
)
def test_what_our_model_would_compute_differently_is_refused(folders, tmp_path, change, told):
    for file in (folders / "llama2").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UserError) as error:
        pretrained.open_weights(str(tmp_path))
    assert told in str(error.value)


def test_a_window_limits_the_context(folders, tmp_path, data):
    told = refused(tmp_path, data, init_from=folders / "mistral", block_size=64)
    assert told.startswith("block_size = 64: must be at most 48, as in ")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    """A model's folder with a byte-level BPE tokenizer of 300 ids."""
    folder = tmp_path_factory.mktemp("tokenizer")
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    from tokenizers import decoders

    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    made.train_from_iterator(["the cat and the dog see the big red fox run home"] * 10, trainer)
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<|end|>", "tokenizer_class": "PreTrainedTokenizerFast"})
    )
    return folder


def test_a_models_tokenizer_prepares_data_and_travels_with_the_run(tokenizer, folders, tmp_path):
    (tmp_path / "text.txt").write_text("the cat and the dog see the big red fox.\n" * 2000)
    told = prepare(
        "text", "--input", tmp_path / "text.txt", "--name", "x", "--tokenizer", tokenizer, "--out", tmp_path / "data"
    )
    assert "vocabulary 287" in told, "fewer merges are possible than were asked for"
    dataset = open_dataset(tmp_path / "data")
    assert dataset.tokenizer.end_of_text == 0 and (tmp_path / "data" / "tokenizer.json").exists()
    assert dataset.val_bytes == 199 * 41, "of the last tenth, from the next line on"
    theirs: Any = AutoTokenizer.from_pretrained(tokenizer)
    text = "the red fox <|end|> é日"
    assert dataset.tokenizer.decode(dataset.tokenizer.encode(text).tolist()) == text
    assert dataset.tokenizer.encode(text, allow_special=True).tolist() == theirs.encode(text)
    assert 0 not in dataset.tokenizer.encode(text), "text is text"
    train(tmp_path / "run", tmp_path / "data", init_from=folders / "llama2", max_iters=5, eval_interval=5)
    (row,) = [
        json.loads(line)
        for line in (tmp_path / "run" / "metrics.jsonl").open()
        if '"eval"' in line and '"step": 5' in line
    ]
    assert row["val_bpb"] == pytest.approx(
        row["val_loss"] / 0.6931 * dataset.tokens["val"] / dataset.val_bytes, rel=1e-3
    )
    done = run("sample.py", out_dir=tmp_path / "run", start="the cat", num_samples=1, max_new_tokens=5, device="cpu")
    assert done.stdout.startswith("the cat"), done.stderr
    convert(str(tmp_path / "run"), tmp_path / "hf", "hf")
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").encode(text) == theirs.encode(text)
    convert(str(tmp_path / "run"), tmp_path / "again", "train")
    assert (tmp_path / "again" / "tokenizer.json").exists()


def test_a_tokenizer_that_is_missing_or_another_is_an_error(tokenizer, tmp_path, data):
    (tmp_path / "text.txt").write_text("the cat and the dog\n" * 500)
    prepare(
        "text", "--input", tmp_path / "text.txt", "--name", "x", "--tokenizer", tokenizer, "--out", tmp_path / "data"
    )
    train(tmp_path / "run", tmp_path / "data", max_iters=2)
    file = tmp_path / "run" / "tokenizer.json"
    file.write_text(file.read_text() + " ")
    settings = {"out_dir": tmp_path / "run", "device": "cpu", "num_samples": 1, "max_new_tokens": 1}
    assert f"{file} is another tokenizer than that of the data" in message(run("sample.py", **settings))
    file.unlink()
    assert f"{file} is missing; copy it there" in message(run("sample.py", **settings))
    told = prepare(
        "text", "--input", tmp_path / "text.txt", "--name", "x", "--tokenizer", tmp_path, "--out", tmp_path / "d"
    )
    assert "is no tokenizer of Hugging Face" in told
