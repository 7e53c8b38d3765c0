"""GPT-2's weights: real models of `transformers`, small and random, through our loader."""

import json
import math
import re
import shutil
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from model import GPT, GPTConfig
from tests.checkpoints import greedy
from tests.running import TINY, difference, losses, message, run, train, zero_json
from training import model_state, pretrained
from training.config import TrainConfig, parse
from training.errors import UserError


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A folder as save_pretrained leaves it, and the model."""
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=64, vocab_size=300, initializer_range=0.2)
    model = GPT2LMHeadModel(config).eval()
    folder = tmp_path_factory.mktemp("gpt2")
    model.save_pretrained(folder)
    return folder, model


def load(source: str) -> GPT:
    config, weights = pretrained.open_weights(source)
    model = GPT(config)
    weights.into(model)
    return model.eval()


def test_logits_and_text_are_those_of_transformers(gpt2):
    folder, theirs = gpt2
    ours = load(str(folder))
    tokens = torch.randint(300, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits[:, -1], rtol=1e-5, atol=1e-5)
        expected = theirs.generate(tokens, max_new_tokens=20, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(ours.generate(tokens, 20, greedy), expected)


def test_an_older_file_with_masks_works_too(gpt2, tmp_path):
    """And with names as OpenAI's own weights have them."""
    folder, theirs = gpt2
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    masks = {f"h.0.attn.{name}": torch.ones(1) for name in ("bias", "masked_bias")}
    state = {name.removeprefix("transformer."): tensor.clone() for name, tensor in theirs.state_dict().items()}
    save_file({**state, **masks}, tmp_path / "model.safetensors")
    for (name, one), other in zip(load(str(tmp_path)).named_parameters(), load(str(folder)).parameters(), strict=True):
        assert torch.equal(one, other), name


def test_fine_tuning_starts_at_the_weights_with_a_shorter_context(gpt2, data, tmp_path):
    folder, theirs = gpt2
    train(tmp_path, data, init_from=folder, block_size=32, max_iters=2, learning_rate=1e-9)
    saved = model_state.read_torch_file(tmp_path / "checkpoints" / "step_000002" / "model.pt")
    assert saved["transformer.wpe.weight"].shape == (32, 32)
    torch.testing.assert_close(saved["transformer.wte.weight"], theirs.transformer.wte.weight, rtol=0, atol=1e-6)
    output = train(tmp_path, data, init_from="resume", block_size=32, max_iters=3)
    assert "resuming" in output, "a run of GPT-2's shape resumes without naming that shape"


def test_the_recipe_is_the_same_by_both_scripts(data, tmp_path):
    """From a GPT-2 of all 50257 ids, as from the hub: its own file, its losses by ZeRO those of one process."""
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=64)).save_pretrained(tmp_path / "gpt2")
    recipe: dict[str, Any] = {"init_from": tmp_path / "gpt2", "dataset": data, "block_size": 32, "learning_rate": 1e-3}
    recipe |= {"gradient_accumulation_steps": 4, "max_iters": 5, "eval_iters": 2, "log_interval": 1}
    recipe |= {"device": "cpu", "compile": False}
    for name, ranks in (("single", 0), ("zero2", 2), ("zero3", 2)):
        script = "train_deepspeed.py" if ranks else "train.py"
        settings: dict[str, Any] = {"deepspeed_config": zero_json(name)} if ranks else {}
        done = run(script, "config/finetune_shakespeare.py", ranks=ranks, out_dir=tmp_path / name, **recipe, **settings)
        assert done.returncode == 0, done.stderr
        assert difference(tmp_path / "single", tmp_path / name) <= 1e-5
    found = losses(tmp_path / "single")
    assert len(found) == 5 and abs(found[0] - math.log(50257)) < 0.5 and found[4] < found[0]


def test_an_evaluation_recipe_evaluates_the_weights(gpt2, data, tmp_path):
    """Its val loss is that of the model of `transformers` on the same data, within the noise of random batches."""
    settings = {"init_from": gpt2[0], "dataset": data, "block_size": 32, "eval_iters": 20, "device": "cpu"}
    done = run("train.py", "config/eval_gpt2.py", out_dir=tmp_path / "out", compile=False, **settings)
    found = re.search(r"val loss ([\d.]+)", done.stdout)
    assert done.returncode == 0 and found, done.stderr
    tokens = torch.from_numpy(np.fromfile(data / "val.bin", "<u2").astype(np.int64))
    tokens = tokens[: len(tokens) // 33 * 33].view(-1, 33)[:300]
    with torch.no_grad():
        expected = F.cross_entropy(gpt2[1](tokens[:, :-1]).logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert abs(float(found[1]) - float(expected)) < 0.05 * float(expected)


@pytest.mark.parametrize("script", ["train.py", "train_deepspeed.py"])
@pytest.mark.parametrize(
    "wrong, told",
    [
        ("nothing", "must be scratch, resume, gpt2, gpt2-medium"),
        ("llama", "model_type = 'llana': must be one of gpt2, llama, mistral, qwen2, qwen3; did you mean llama?"),
        ("gpt2", "give their folder instead of gpt2"),
    ],
)
def test_either_script_says_what_to_do_once(gpt2, data, tmp_path, script, wrong, told):
    """A folder without weights, another model, the hub without a network; told by one of two ranks."""
    (tmp_path / "llama").mkdir()
    about = json.loads((gpt2[0] / "config.json").read_text())
    (tmp_path / "llama" / "config.json").write_text(json.dumps({**about, "model_type": "llana"}))
    init_from = wrong if wrong == "gpt2" else tmp_path / wrong
    settings = {**TINY, "dataset": data, "out_dir": tmp_path / "out", "init_from": init_from, "batch_size": 1}
    settings |= {"gradient_accumulation_steps": 2}
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    assert told in message(run(script, ranks=2, env=offline, **settings))


@pytest.mark.parametrize(
    "change, told",
    [
        ({"model_type": "opt"}, "model_type = 'opt': must be one of gpt2, llama, mistral, qwen2, qwen3"),
        ({"activation_function": "relu"}, "activation_function = 'relu': only models with"),
        ({"activation_function": [1]}, r"activation_function = '\[1\]': only models with"),
        (
            {"scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx = True: only models with .* = False",
        ),
        ({"scale_attn_weights": False}, "scale_attn_weights = False: only models with .* = True can be read"),
        ({"n_layer": "2"}, "n_layer = '2': must be an integer"),
    ],
)
def test_another_architecture_is_refused(gpt2, tmp_path, change, told):
    about = json.loads((gpt2[0] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**about, **change}))
    with pytest.raises(UserError, match=told):
        pretrained.open_weights(str(tmp_path))


def test_a_gpt2_may_have_another_width_epsilon_and_head(tmp_path):
    sizes: dict = {"vocab_size": 300, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}
    other: dict = {"n_inner": 80, "layer_norm_epsilon": 1e-2, "tie_word_embeddings": False}
    theirs = GPT2LMHeadModel(GPT2Config(**sizes, **other)).eval()
    theirs.save_pretrained(tmp_path)
    tokens = torch.randint(300, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(load(str(tmp_path))(tokens), theirs(tokens).logits[:, -1], rtol=1e-5, atol=1e-5)


def test_damaged_files_are_named(gpt2, tmp_path):
    messages = {"model.safetensors": "cannot be read", "config.json": "does not describe a model .JSONDecodeError"}
    for name, told in messages.items():
        folder = shutil.copytree(gpt2[0], tmp_path / name)
        (folder / name).write_bytes((folder / name).read_bytes()[:-9])
        with pytest.raises(UserError, match=f"{name} {told}"):
            pretrained.open_weights(str(folder))
    (folder / "config.json").write_text("[" * 10**5)
    with pytest.raises(UserError, match=r"does not describe a model .RecursionError"):
        pretrained.open_weights(str(folder))
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UserError, match="'n_positions' is missing"):
        pretrained.open_weights(str(folder))


@pytest.mark.parametrize("files", [3, ["a"], {"a": 3}, {"a": "x.safetensors"}])
def test_an_index_that_names_no_file(gpt2, tmp_path, files):
    shutil.copy(gpt2[0] / "config.json", tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    with pytest.raises(UserError, match=r"index\.json cannot be read|has no .*; download it"):
        pretrained.open_weights(str(tmp_path))


@pytest.mark.parametrize("content", [[1], 3, {"wte.weight": 1}])
def test_a_pickle_without_tensors(gpt2, tmp_path, content):
    shutil.copy(gpt2[0] / "config.json", tmp_path)
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin must hold tensors by name"):
        pretrained.open_weights(str(tmp_path))


def test_the_run_decides_on_dropout_and_context_and_the_weights_on_the_rest(gpt2):
    line = f"--init_from={gpt2[0]} --block_size=32 --dropout=0.3 --activation_checkpointing=True --n_layer=9"
    cfg = parse(TrainConfig, line.split(), "")
    config, weights = pretrained.start_from(cfg, 300)
    assert config == GPTConfig(32, 300, 2, 2, 32, 0.3, True, "tanh", True)
    assert weights.whole("transformer.wpe.weight").shape == (32, 32)
    with pytest.raises(UserError, match=r"has 301 ids, but the weights of .* have 300"):
        pretrained.start_from(cfg, 301)


def test_weights_that_do_not_fit_the_run(gpt2, data, tmp_path):
    settings = {**TINY, "dataset": data, "out_dir": tmp_path, "init_from": gpt2[0]}
    assert "block_size = 65: must be at most 64, as in " in run("train.py", **{**settings, "block_size": 65}).stderr
    missing = run("train.py", **{**settings, "init_from": "gpt-2"}).stderr
    assert missing.startswith("error: init_from = 'gpt-2': must be scratch, resume, gpt2, gpt2-medium")
    offline = run(
        "train.py", env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}, **{**settings, "init_from": "gpt2"}
    )
    assert offline.returncode == 2
    assert (
        "'gpt2' is no folder, and cannot be downloaded" in offline.stderr
        and "give their folder instead of gpt2" in offline.stderr
    )
