"""DeepSpeed's JSON: literals become settings, "auto" is resolved as by the Hugging Face Trainer, gaps are filled in."""

import json
import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from model import GPTConfig
from tests.running import ROOT, TINY, losses, message, run
from training import deepspeed_config
from training.config import parse
from training.deepspeed_config import DeepSpeedTrainConfig, read, resolve, strategy_of, swap_folder
from training.deepspeed_engine import own_swap_folders
from training.deepspeed_json import KEYS
from training.distributed import SINGLE_PROCESS, Ranks
from training.errors import ConfigError

JSONS = sorted((ROOT / "deepspeed_configs").glob("*.json"))
TWO = replace(SINGLE_PROCESS, world_size=2)
CUDA = replace(TWO, device=torch.device("cuda", 0))


def settings(config: Any, *words: str, ranks: Ranks = TWO) -> DeepSpeedTrainConfig:
    """The settings of a run with this JSON (a value, or the text of the file) and these words on its command line."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file, pytest.MonkeyPatch.context() as patch:
        file.write(config if isinstance(config, str) else json.dumps(config))
        file.flush()
        patch.setenv("WORLD_SIZE", str(ranks.world_size))
        cfg = parse(DeepSpeedTrainConfig, [f"--deepspeed_config={file.name}", *words], "")
    return replace(cfg, deepspeed_config="ds.json")


def literal(config: Any, *words: str, ranks: Ranks = TWO) -> tuple[DeepSpeedTrainConfig, dict[str, Any]]:
    """The settings, and the JSON as it is resolved."""
    cfg = settings(config, *words, ranks=ranks)
    return cfg, resolve(cfg, ranks, cfg.model_config(257), config)[0]


def resolved(config: dict[str, Any], ranks: Ranks = TWO, **given) -> dict[str, Any]:
    """The JSON as it is resolved where the user sets all of TINY."""
    words = [f"--{k}={v}" for k, v in {**TINY, "grad_clip": 1.0, "gradient_accumulation_steps": 4, **given}.items()]
    return literal(config, *words, ranks=ranks)[1]


@pytest.mark.parametrize("path", JSONS, ids=lambda path: path.stem)
def test_the_jsons_resolve_as_in_the_hugging_face_trainer(path, tmp_path):
    """The same numbers for the same settings; values that the Trainer does not resolve may differ."""
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    assert path.stem == f"{strategy_of(read(str(path)))}_config"

    class Arguments:
        world_size, per_device_train_batch_size, gradient_accumulation_steps = 2, 4, 2
        max_grad_norm, learning_rate, adam_beta1, adam_beta2 = 1.0, 1e-3, 0.9, 0.95
        adam_epsilon, weight_decay, save_on_each_node = 1e-8, 0.1, False
        fp16 = fp16_full_eval = bf16_full_eval = False
        bf16 = True

        def get_warmup_steps(self, steps):
            return 5

    class Model:
        class config:
            hidden_size = 32

    theirs = HfTrainerDeepSpeedConfig(str(path))
    theirs.trainer_config_process(Arguments())
    theirs.trainer_config_finalize(Arguments(), Model(), 30)
    ours = resolved(read(str(path)), dtype="bfloat16", weight_decay=0.1, nvme_path=tmp_path)

    def compare(one: Any, other: Any, place: str = "") -> None:
        if isinstance(one, dict):
            for name, value in one.items():
                compare(value, other[name], f"{place}.{name}")
        elif not (
            place.endswith(("nvme_path", "overlap_comm", "hpz_partition_size"))
            or place.startswith((".bf16", ".train_batch", ".zero_optimization.off"))
        ):
            assert one == other or one == pytest.approx(other), place

    compare(theirs.config, ours)
    assert '"auto"' not in json.dumps(ours)


def test_omitted_values_are_filled_in():
    """DeepSpeed's own defaults clip at 1.0, and train in fp32 with another learning rate."""
    config: dict[str, Any] = {"zero_optimization": {"stage": 1}, "optimizer": {"type": "AdamW"}}
    found = resolved(config, dtype="bfloat16", grad_clip=0.0, learning_rate=0.5)
    assert (found["gradient_clipping"], found["bf16"], found["fp16"]) == (0.0, {"enabled": True}, {"enabled": False})
    assert (found["train_batch_size"], found["train_micro_batch_size_per_gpu"]) == (16, 4)
    assert found["optimizer"]["params"]["lr"] == 0.5
    half: dict[str, Any] = {"fp16": {"enabled": "auto"}, "zero_optimization": {"stage": 1}}
    assert resolved(half, CUDA, dtype="float16")["fp16"]["enabled"] is True
    half = resolved({**half, "zero_optimization": {"stage": 0}}, CUDA, dtype="float16")
    assert half["torch_autocast"] == {"enabled": True, "dtype": "float16"} and not half["fp16"]["enabled"]


GUIDE = {
    **{"train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 5, "gradient_clipping": 0.5},
    **{"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}},
    "optimizer": {"type": "Adam", "params": {"lr": 1, "betas": [0.8, 0.7], "eps": 1e-6, "weight_decay": 0.01}},
}
TAKEN = {
    **{"batch_size": 3, "gradient_accumulation_steps": 10, "grad_clip": 0.5, "dtype": "bfloat16"},
    **{"learning_rate": 1.0, "beta1": 0.8, "beta2": 0.7, "weight_decay": 0.01},
}


def test_literals_become_settings():
    cfg, config = literal(GUIDE)
    assert {name: vars(cfg)[name] for name in TAKEN} == TAKEN
    params = config["optimizer"]["params"]
    assert (params["lr"], params["betas"], params["eps"]) == (1.0, [0.8, 0.7], 1e-6), "there is no setting for eps"
    assert config["train_batch_size"] == 3 * 5 * 2 and config["bf16"] == {"enabled": True}


def test_the_user_comes_before_the_json_and_the_json_before_the_resumed_run(tmp_path):
    run = {"learning_rate": 7.0, "beta1": 0.1, "max_iters": 7, "batch_size": 7, "seed": 7}
    (tmp_path / "config.json").write_text(json.dumps(run))
    cfg = settings(GUIDE, "--init_from=resume", f"--out_dir={tmp_path}", "--beta1=0.2", "--seed=1")
    assert (cfg.beta1, cfg.seed) == (0.2, 1)
    assert (cfg.learning_rate, cfg.batch_size, cfg.beta2) == (1.0, 3, 0.7)
    assert (cfg.max_iters, cfg.n_layer) == (7, 12)


@pytest.mark.parametrize(
    "blocks, dtype",
    [
        ({"fp16": {"enabled": True}}, "float16"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": False}}, "bfloat16"),
        ({"bf16": {"enabled": False}}, "float32"),
        ({"bf16": {"enabled": False}, "fp16": {"enabled": "auto"}}, "auto"),
        ({"bf16": {"enabled": "auto"}, "fp16": {"loss_scale": 0}}, "auto"),
        ({}, "auto"),
    ],
    ids=str,
)
def test_dtype_follows_the_json(blocks, dtype):
    assert settings(blocks).dtype == dtype
    assert settings(blocks, "--dtype=float32").dtype == "float32"


@pytest.mark.parametrize("enabled", [True, False, "auto"])
def test_bf16_without_zero_is_autocast(enabled):
    """DeepSpeed's own bf16 would accumulate gradients in bf16 there."""
    words = [] if enabled is True else ["--dtype=bfloat16"]
    if enabled is False:
        with pytest.raises(ConfigError, match=r"bf16\.enabled = false: contradicts dtype = bfloat16"):
            literal({"bf16": {"enabled": False}, "zero_optimization": {"stage": 1}}, *words)
    config = literal({"bf16": {"enabled": enabled}}, *words)[1]
    assert (config["bf16"]["enabled"], config["torch_autocast"]) == (False, {"enabled": True, "dtype": "bfloat16"})


def test_a_block_of_activation_checkpointing_switches_it_on():
    block = {"partition_activations": True, "contiguous_memory_optimization": True, "number_checkpoints": None}
    cfg, config = literal({"activation_checkpointing": block}, "--n_layer=3")
    assert cfg.activation_checkpointing and config["activation_checkpointing"]["number_checkpoints"] == 3


def batch(total: Any = None, micro: Any = None, steps: Any = None) -> dict[str, Any]:
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    return {name: n for name, n in zip(names, (total, micro, steps), strict=True) if n is not None}


BATCHES: list[tuple[dict[str, Any], str, int, tuple[int, int] | str]] = [
    (batch(), "", 2, (12, 40)),  # of the settings
    (batch(32), "", 2, (16, 2)),  # as in DeepSpeed: one micro-step per rank
    (batch(32), "--batch_size=4", 2, (4, 8)),
    (batch(32), "--gradient_accumulation_steps=4", 2, (8, 4)),
    (batch(32, 4), "", 2, (4, 8)),
    (batch(32, None, 4), "", 2, (4, 8)),
    (batch(32, 4, 1), "", 8, (4, 8)),
    (batch(32, "auto", 1), "", 8, (4, 8)),
    (batch(None, 4, 3), "", 2, (4, 6)),
    (batch(None, 4), "", 2, (4, 2)),
    (batch(None, 4), "--gradient_accumulation_steps=6", 2, (4, 6)),
    (batch(None, 4), "--batch_size=4", 2, (4, 2)),
    (batch(None, None, 3), "", 2, (12, 6)),
    (batch("auto", "auto", "auto"), "--batch_size=5", 2, (5, 40)),
    (batch(32, 4, 1), "--batch_size=4 --gradient_accumulation_steps=8", 8, (4, 8)),
    (
        batch(32, 4, 1),
        "",
        2,
        "train_batch_size = 32: is not 4 sequences x 1 micro-step x 2 ranks = 8; "
        'write "gradient_accumulation_steps": 4',
    ),
    (batch(32, 4, 1), "", 3, "train_batch_size = 32: is not 4 sequences x 1 micro-step x 3 ranks = 12; write 12"),
    (batch(128, 4), "", 3, "train_batch_size = 128: is not 4 sequences x 10 micro-steps x 3 ranks = 120; write 120"),
    (batch(2), "", 4, "train_batch_size = 2: is not 1 sequence x 1 micro-step x 4 ranks = 4; write 4"),
    (
        batch(32, 4),
        "--gradient_accumulation_steps=4",
        2,
        "train_batch_size = 32: is not 4 sequences x 2 micro-steps x 2 ranks = 16; write 16",
    ),
    (
        batch(32, 4, 1),
        "--batch_size=8 --gradient_accumulation_steps=4",
        2,
        "train_micro_batch_size_per_gpu = 4, gradient_accumulation_steps = 1: contradicts batch_size = 8 "
        'x 2 micro-steps x 2 ranks = 32 (gradient_accumulation_steps = 4 is the total over all ranks); write "auto"',
    ),
    (
        batch(None, 8),
        "--batch_size=4",
        2,
        "train_micro_batch_size_per_gpu = 8: contradicts batch_size = 4 x 20 micro-steps x 2 ranks = 160 "
        '(gradient_accumulation_steps = 40 is the total over all ranks); write "auto"',
    ),
]


@pytest.mark.parametrize("config, words, ranks, expected", BATCHES, ids=lambda value: str(value)[:40])
def test_one_or_two_of_the_batch_sizes_give_the_rest(config, words, ranks, expected):
    """(batch_size, gradient_accumulation_steps over all ranks), or one message whose fix works."""
    some = replace(SINGLE_PROCESS, world_size=ranks)
    if isinstance(expected, tuple):
        cfg, found = literal(config, *words.split(), ranks=some)
        assert (cfg.batch_size, cfg.gradient_accumulation_steps) == expected
        assert found["train_batch_size"] == expected[0] * expected[1]
        assert found["gradient_accumulation_steps"] * ranks == expected[1]
        return
    with pytest.raises(ConfigError) as error:
        literal(config, *words.split(), ranks=some)
    assert str(error.value) == f"1 problem in ds.json\n  {expected}"
    product = int(re.findall(r"ranks = (\d+)", expected)[0])
    if 'write "auto"' in expected:
        fixed = {**config, **{name: "auto" for name in config if f"{name} = {config[name]}" in expected.split(":")[0]}}
    elif 'write "' in expected:
        fixed, product = {**config, "gradient_accumulation_steps": 4}, 32
    else:
        fixed = {**config, "train_batch_size": product}
    assert literal(fixed, *words.split(), ranks=some)[1]["train_batch_size"] == product


def test_a_total_is_divided_by_the_batch_size_of_the_resumed_run(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"batch_size": 4, "gradient_accumulation_steps": 8}))
    words = ["--init_from=resume", f"--out_dir={tmp_path}"]
    cfg = settings(batch(32), *words, ranks=replace(SINGLE_PROCESS, world_size=4))
    assert (cfg.batch_size, cfg.gradient_accumulation_steps) == (4, 8)
    assert settings(batch(None, 2), *words).gradient_accumulation_steps == 8, "the run's comes before DeepSpeed's rule"


COMMENTED = """{ // DeepSpeed's guides write this
  "train_batch_size": 32, /* over all
     "ranks" */ "flops_profiler": {"output_file": "http://x /* y */ \\"//"},  // "bf16": {}
  "zero_optimization": {"stage": 2}
}"""


def test_comments_are_left_out_and_lines_are_counted_with_them(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(COMMENTED)
    blocks = {"zero_optimization": {"stage": 2}, "flops_profiler": {"output_file": 'http://x /* y */ "//'}}
    assert read(str(path)) == {"train_batch_size": 32, **blocks}
    path.write_text(COMMENTED.replace("2}\n", "2},\n"))  # a trailing comma
    with pytest.raises(ConfigError, match=rf"^{path}:[45]: not valid JSON"):
        read(str(path))
    path.write_text(COMMENTED.replace("/* over", "over"))
    with pytest.raises(ConfigError, match=rf"^{path}:2: not valid JSON"):
        read(str(path))


def test_a_run_with_a_literal_json_records_its_values_and_resumes_bit_for_bit(tmp_path, data):
    (tmp_path / "ds.json").write_text(json.dumps({**GUIDE, "train_batch_size": 30}))
    own = ("batch_size", "gradient_accumulation_steps", "learning_rate", "out_dir")
    tiny = {name: value for name, value in TINY.items() if name not in own}
    tiny |= {"dataset": data, "deepspeed_config": tmp_path / "ds.json", "lr_decay_iters": 6, "eval_interval": 3}
    for folder, steps in (("whole", 6), ("parts", 3)):
        done = run("train_deepspeed.py", ranks=2, **{**tiny, "out_dir": tmp_path / folder, "max_iters": steps})
        assert done.returncode == 0, done.stderr
    recorded = json.loads((tmp_path / "parts" / "config.json").read_text())
    assert {name: recorded[name] for name in TAKEN} == TAKEN
    done = run("train_deepspeed.py", ranks=2, init_from="resume", out_dir=tmp_path / "parts", max_iters=6)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    refused = run("train_deepspeed.py", init_from="resume", out_dir=tmp_path / "parts", max_iters=9)
    assert 'train_batch_size = 30: is not 3 sequences x 5 micro-steps x 1 rank = 15; write "grad' in message(refused)


def test_the_known_keys_are_deepspeeds():
    import deepspeed

    def names(block: dict[str, Any]) -> set[str]:
        blocks = [value for value in block.values() if isinstance(value, dict)]
        return block.keys() | set().union(*map(names, blocks))

    source = "\n".join(path.read_text() for path in Path(deepspeed.__file__).parent.rglob("*.py"))
    missing = {name for name in names(KEYS) if f'"{name}"' not in source and f"'{name}'" not in source}
    # keys of torch's AdamW, and pydantic fields, which are names and not strings
    fields = {"tensorboard", "csv_monitor", "use_gds", "enabled", "synchronized", "stage", "buffer_size"}
    assert missing <= {"lr", "eps", "fused", "torch_adam", *fields}, missing


@pytest.mark.parametrize("offloaded, torch_adam", [("param", True), ("optimizer", False)])
def test_an_offloaded_optimizer_is_deepspeeds(offloaded, torch_adam):
    """With only the parameters offloaded it is torch's, as without offload."""
    config = read(str(ROOT / "deepspeed_configs" / "zero3_config.json"))
    config["zero_optimization"][f"offload_{offloaded}"] = {"device": "cpu"}
    assert resolved(config)["optimizer"]["params"].get("torch_adam", False) is torch_adam


@pytest.mark.parametrize("given, expected", [({}, True), ({"torch_adam": False}, False)])
def test_fused_adam_is_chosen_by_the_json_only(given, expected):
    """It needs a CUDA compiler, which a runtime container does not have; torch's AdamW is one kernel, too."""
    config: dict[str, Any] = {"zero_optimization": {"stage": 1}, "optimizer": {"type": "AdamW", "params": given}}
    assert resolved(config, CUDA, dtype="float32")["optimizer"]["params"]["torch_adam"] is expected


def test_another_optimizer_of_ours_replaces_the_block(monkeypatch):
    monkeypatch.setattr(deepspeed_config, "make_optimizer", lambda model, cfg: torch.optim.SGD(model.parameters()))
    config = resolved(read(str(ROOT / "deepspeed_configs" / "zero2_offload_config.json")))
    assert "optimizer" not in config and config["zero_allow_untested_optimizer"]
    assert config["zero_force_ds_cpu_optimizer"] is False


def test_a_run_has_its_own_swap_folder(tmp_path):
    config: dict[str, Any] = {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}
    cfg = settings(config, f"--nvme_path={tmp_path}", "--out_dir=out", ranks=SINGLE_PROCESS)
    elsewhere = replace(cfg, out_dir="there/out")
    left, other = swap_folder(str(tmp_path), cfg) / "left by a killed run", swap_folder(str(tmp_path), elsewhere)
    assert swap_folder(str(tmp_path), replace(cfg, eval_only=True)) not in (left.parent, other)
    for path in (left, other):
        path.mkdir(parents=True)
    given, _ = resolve(cfg, SINGLE_PROCESS, GPTConfig(), config)
    assert given["zero_optimization"]["offload_param"]["nvme_path"] == str(left.parent)
    with own_swap_folders(given, SINGLE_PROCESS):
        assert not left.exists()
        left.mkdir(parents=True)
    assert list(tmp_path.iterdir()) == [other], "the run left its own folder, or removed another run's"
