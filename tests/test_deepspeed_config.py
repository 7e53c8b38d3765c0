"""DeepSpeed's JSON: "auto" as the Hugging Face Trainer fills it in, and what it leaves out."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.running import ROOT, TINY
from training import deepspeed_config, nvme
from training.config import parse
from training.deepspeed_config import DeepSpeedTrainConfig, read, resolve, strategy_of
from training.deepspeed_rules import BLOCKS
from training.distributed import ALONE

JSONS = sorted((ROOT / "deepspeed_configs").glob("*.json"))
TWO = replace(ALONE, world_size=2)
CUDA = replace(TWO, device=torch.device("cuda", 0))


def settings(**given) -> DeepSpeedTrainConfig:
    tiny = {**TINY, "gradient_accumulation_steps": 4, **given}
    return parse(DeepSpeedTrainConfig, [f"--{k}={v}" for k, v in tiny.items()], "")


def resolved(config: dict[str, Any], ranks=TWO, dtype=torch.float32, **given) -> dict[str, Any]:
    cfg = settings(**given)
    return resolve(cfg, ranks, cfg.model_config(257), config, dtype)


@pytest.mark.parametrize("path", JSONS, ids=lambda path: path.stem)
def test_the_jsons_say_what_the_hugging_face_trainer_makes_of_them(path, tmp_path):
    """The same numbers for the same settings, by its own code; what it leaves alone may be more precise here."""
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
    ours = resolved(read(str(path)), dtype=torch.bfloat16, weight_decay=0.1, nvme_path=tmp_path)

    def compare(one: Any, other: Any, place: str = "") -> None:
        if isinstance(one, dict):
            for name, value in one.items():
                compare(value, other[name], f"{place}.{name}")
        elif not (
            place.endswith(("nvme_path", "overlap_comm"))
            or place.startswith((".bf16", ".train_batch", ".zero_optimization.off"))
        ):
            assert one == other or one == pytest.approx(other), place

    compare(theirs.config, ours)
    assert '"auto"' not in json.dumps(ours)


def test_what_the_json_leaves_out_is_filled_in_as_well():
    """DeepSpeed's own defaults would clip at 1.0, and train in fp32 with another learning rate."""
    config: dict[str, Any] = {"zero_optimization": {"stage": 1}, "optimizer": {"type": "AdamW"}}
    found = resolved(config, CUDA, torch.bfloat16, grad_clip=0.0, learning_rate=0.5)
    assert (found["gradient_clipping"], found["bf16"], found["fp16"]) == (0.0, {"enabled": True}, {"enabled": False})
    assert (found["train_batch_size"], found["train_micro_batch_size_per_gpu"]) == (16, 4)
    assert found["optimizer"]["params"]["lr"] == 0.5
    assert resolved({"fp16": {"enabled": "auto"}}, CUDA, torch.float16)["fp16"]["enabled"] is True


def test_dtype_auto_follows_a_json_that_has_chosen():
    cfg = settings()
    assert deepspeed_config.wanted_dtype(cfg, {"fp16": {"enabled": True}}) == "float16"
    assert deepspeed_config.wanted_dtype(cfg, {"bf16": {"enabled": "auto"}}) == "auto"
    assert deepspeed_config.wanted_dtype(replace(cfg, dtype="float32"), {"bf16": {"enabled": True}}) == "float32"


def test_arguments_in_the_forms_of_deepspeeds_launcher_and_users():
    given = ["--local_rank=1", "config/x.py", "--deepspeed", "--deepspeed_config", "a.json", "--verbose", "--seed=2"]
    found = ["config/x.py", "--deepspeed_config=a.json", "--verbose", "--seed=2"]
    assert deepspeed_config.arguments(given) == found


def test_the_known_keys_are_deepspeeds():
    import deepspeed

    source = "\n".join(path.read_text() for path in Path(deepspeed.__file__).parent.rglob("*.py"))
    missing = [
        n for names in BLOCKS.values() for n in names.split() if f'"{n}"' not in source and f"'{n}'" not in source
    ]
    # of torch's AdamW, and of pydantic fields, which are names and not strings
    assert set(missing) <= {"lr", "eps", "fused", "torch_adam", "tensorboard", "csv_monitor", "use_gds"}, missing


@pytest.mark.parametrize("offloaded, torchs", [("param", True), ("optimizer", False)])
def test_whose_adamw_depends_on_where_the_optimizer_is(offloaded, torchs):
    """Weights alone may be offloaded: the optimizer is torch's then where FusedAdam cannot be, as without offload."""
    config = read(str(ROOT / "deepspeed_configs" / "zero3_config.json"))
    config["zero_optimization"][f"offload_{offloaded}"] = {"device": "cpu"}
    assert resolved(config)["optimizer"]["params"].get("torch_adam", False) is torchs


def test_a_run_swaps_into_a_folder_of_its_own(tmp_path):
    config: dict[str, Any] = {"zero_optimization": {"offload_param": {"device": "nvme", "nvme_path": "/other"}}}
    left, others = nvme.own(str(tmp_path), "out") / "of a killed run", nvme.own(str(tmp_path), "there/out")
    for path in (left, others):
        path.mkdir(parents=True)
    with nvme.own_folder(config, str(tmp_path), "out", ALONE):
        assert not left.exists()
        nvme.take_disk(config, str(tmp_path))
        nvme.take_own(config, "out")
        assert config["zero_optimization"]["offload_param"]["nvme_path"] == str(left.parent)
        left.mkdir(parents=True)
    assert list(tmp_path.iterdir()) == [others], "a run leaves its own behind, or took another's away"
