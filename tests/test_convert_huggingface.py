"""Weights from and to `transformers`: the same logits and text at every stop, tokenizers included."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from model import GPTConfig
from tests.checkpoints import SMALL, logits, run_folder
from tests.running import run
from tools.convert import convert
from tools.convert_read import open_source

SAMPLE = "The 2 quick foxes' 12,345 jumps:\n\n\tnaïve café — 漢字 can't won't   end.  \n x = y**2  # ok"


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A random GPT-2 of theirs with all of GPT-2's ids, and the folder in which it was saved."""
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=64, initializer_range=0.1)
    model = GPT2LMHeadModel(config).eval()
    folder = tmp_path_factory.mktemp("theirs") / "gpt2"
    model.save_pretrained(folder)
    return folder, model


@torch.no_grad()
def test_from_them_through_our_formats_and_back(theirs, tmp_path, bpe_files):
    """Logits are equal to 1e-6 at each stop, and their greedy text is sample.py's."""
    folder, model = theirs
    tokens = torch.randint(50257, (2, 20))
    expected = model(tokens).logits[:, -1]
    at = folder
    for to in ("train", "safetensors", "hf"):
        lines = convert(str(at), tmp_path / to, to)
        at = tmp_path / to
        saved, about = open_source(str(at))
        torch.testing.assert_close(
            logits(saved, GPTConfig(**about["model"]), tokens), expected, rtol=1e-6, atol=1e-6 * expected.abs().max()
        )
        assert "every tensor equal" in lines[-1]
    again: Any = AutoModelForCausalLM.from_pretrained(at)
    assert torch.equal(again(tokens).logits[:, -1], expected)
    tokenizer: Any = AutoTokenizer.from_pretrained(at)
    start = tokenizer("Once upon a time", return_tensors="pt").input_ids
    text = again.generate(start, max_new_tokens=20, do_sample=False, pad_token_id=0)
    settings: dict[str, Any] = {"start": "Once upon a time", "temperature": 0, "num_samples": 1, "max_new_tokens": 20}
    ours = run("sample.py", out_dir=tmp_path / "train", **settings)
    assert ours.returncode == 0, ours.stderr
    assert ours.stdout == tokenizer.decode(text[0]) + "\n---------------\n"


@pytest.mark.parametrize("bias, gelu", [(False, "none"), (True, "none"), (True, "tanh")])
@torch.no_grad()
def test_our_models_are_theirs_in_one_file_or_several(tmp_path, monkeypatch, bias, gelu):
    config = replace(SMALL, bias=bias, gelu=gelu)
    model, _ = run_folder(tmp_path / "run", config)
    tokens = torch.randint(257, (2, 20))
    for size in (5 * 10**9, 20_000):
        monkeypatch.setattr("tools.convert.MAX_SHARD_BYTES", size)
        convert(str(tmp_path / "run"), tmp_path / "hf", "hf", force=True)
        shards = sorted((tmp_path / "hf").glob("*.safetensors"))
        assert (len(shards) > 3) == (size == 20_000) == (tmp_path / "hf" / "model.safetensors.index.json").exists()
        assert all(path.stat().st_size < 2e4 + 3000 for path in shards[1:]), "but for the embedding they are small"
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
        largest = loaded(tokens).logits.abs().max()
        torch.testing.assert_close(loaded(tokens).logits[:, -1], model(tokens), rtol=0, atol=1e-6 * max(largest, 1))
    convert(str(tmp_path / "hf"), tmp_path / "back", "train", tokenizer={"name": "byte"})
    again, about = open_source(str(tmp_path / "back"))
    assert about["model"]["gelu"] == gelu
    for name in ("transformer.h.1.mlp.c_fc.weight", "transformer.wte.weight"):
        assert torch.equal(again.whole(name), model.state_dict()[name])


def test_padding_is_never_generated(tmp_path):
    model, _ = run_folder(tmp_path / "run")
    with torch.no_grad():
        model.transformer.wte.weight[300] = model.get_parameter("transformer.ln_f.bias") * 100  # the likeliest of all
    convert(str(tmp_path / "run"), tmp_path / "hf", "hf")
    config = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert config["suppress_tokens"] == list(range(257, 320)) and config["eos_token_id"] == 256
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert loaded.generate(torch.tensor([[5]]), max_new_tokens=20, do_sample=True, pad_token_id=0).max() < 257


def test_files_of_several_shards_and_of_pickles_are_read(theirs, tmp_path):
    folder, model = theirs
    expected = open_source(str(folder))[0]
    model.save_pretrained(tmp_path / "shards", max_shard_size="200KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    state = {name.removeprefix("transformer."): tensor for name, tensor in model.state_dict().items()}
    for name, count in (("bin", 1), ("bins", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text((folder / "config.json").read_text())
        files = {f"pytorch_model-{part}.bin": dict(list(state.items())[part::count]) for part in range(count)}
        if count == 1:
            files = {"pytorch_model.bin": state}
        else:
            index = {"weight_map": {weight: file for file, weights in files.items() for weight in weights}}
            (tmp_path / name / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        for file, weights in files.items():  # the format before torch 1.6, as OpenAI's was
            torch.save(weights, tmp_path / name / file, _use_new_zipfile_serialization=count > 1)
    for name in ("shards", "bin", "bins"):
        saved, about = open_source(str(tmp_path / name))
        assert about["tokenizer"] == {"name": "gpt2"} and about["model"]["gelu"] == "tanh"
        for parameter in expected.shapes:
            assert torch.equal(saved.whole(parameter), expected.whole(parameter)), parameter


def test_their_tokenizer_has_tiktokens_ids(theirs, tmp_path, bpe_files):
    import tiktoken

    convert(str(theirs[0]), tmp_path / "hf", "hf")
    tokenizer, encoding = AutoTokenizer.from_pretrained(tmp_path / "hf"), tiktoken.get_encoding("gpt2")
    code = (tmp_path / "hf" / "config.json").read_text() + Path(__file__).read_text()
    for text in (SAMPLE, code, "<|endoftext|>a<|endoftext|>", "\u3000\x85 \r\n\r\nÜber-straße 10000000 '''tis"):
        ids = encoding.encode(text, allowed_special="all")
        assert tokenizer(text).input_ids == ids
        assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id == 50256 and tokenizer.model_max_length == 64
