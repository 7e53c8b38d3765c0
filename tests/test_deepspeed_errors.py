"""DeepSpeed's JSON, and what it needs: each mistake told with its fix, once, and every rank ended."""

import json
import shutil
from typing import Any

import pytest
from torch.utils.cpp_extension import _get_build_directory

from tests.running import ROOT, message, refused, run, train, zero_json
from tests.test_deepspeed_config import resolved
from training.errors import ConfigError

OFFLOAD = {"zero_optimization": {"stage": 1, "offload_param": {"device": "cpu"}}}
CASES: list[tuple[dict[str, Any], str]] = [
    ({"zero_optimisation": {}}, "zero_optimisation: unknown key; did you mean zero_optimization?"),
    ({"optimizer": {"type": "AdamW", "parms": {}}}, "optimizer.parms: unknown key; did you mean params?"),
    ({"flops_profiler": {"enable": True}}, "flops_profiler.enable: unknown key; did you mean enabled?"),
    ({"amp": {"enabled": True}}, "amp: Apex is not supported with ZeRO; set dtype; remove it"),
    ({"optimizer": {"type": "Lamb"}}, "optimizer.type = 'Lamb': must be AdamW"),
    ({"optimizer": {"type": "OneBitAdam"}}, "optimizer.type = 'OneBitAdam': must be AdamW"),
    ({"scheduler": {"type": "Cosine"}}, "scheduler.type = 'Cosine': must be one of LRRangeTest"),
    (
        {"zero_optimization": {"overlap_comm": "auto"}},
        'zero_optimization.overlap_comm = "auto": has no automatic value',
    ),
    (OFFLOAD, "offload_param.device = 'cpu': stage 1 lacks it; take stage 3, or remove the block"),
    (
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme", "nvme_path": "/"}}},
        "offload_optimizer.device = 'nvme': stage 2 lacks it; take stage 3",
    ),
    (
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/no/disk"}}},
        "nvme_path = '/no/disk': no such folder; set --nvme_path to one on a local NVMe disk",
    ),
    ({"train_batch_size": 30}, "train_batch_size = 30: contradicts batch_size = 4 x 2 micro-steps x 2 ranks = 16"),
    (
        {"train_batch_size": 30},
        "or set --gradient_accumulation_steps=6 (for 24), or set --gradient_accumulation_steps=8 (for 32)",
    ),
    ({"gradient_accumulation_steps": 8}, '; write "auto", or set --gradient_accumulation_steps=16'),
    (
        {"gradient_clipping": 0.5},
        'gradient_clipping = 0.5: contradicts grad_clip = 1.0; write "auto", or set --grad_clip=0.5',
    ),
    (
        {"optimizer": {"type": "AdamW", "params": {"lr": 1}}},
        "optimizer.params.lr = 1: contradicts learning_rate = 0.001",
    ),
    ({"bf16": {"enabled": True}}, "bf16.enabled = true: contradicts dtype = float32"),
    ({"activation_checkpointing": {}}, "activation_checkpointing: only says how; set --activation_checkpointing=True"),
]


@pytest.mark.parametrize("config, message", CASES, ids=lambda value: str(value)[:40])
def test_what_cannot_be_is_refused_with_the_fix(config, message):
    with pytest.raises(ConfigError) as error:
        resolved(config)
    assert message in str(error.value), error.value


def test_a_disk_that_is_too_small_is_refused(tmp_path):
    block = {"device": "nvme", "nvme_path": str(tmp_path)}
    config = {"zero_optimization": {"stage": 3, "offload_optimizer": block}}
    with pytest.raises(ConfigError, match=r"GB free, [\d,.]+ GB needed; set --nvme_path elsewhere"):
        resolved(config, n_embd=2**15, n_layer=2**10, n_head=1)


def test_all_problems_are_told_at_once():
    config = {"foo": 1, "optimizer": {"type": "SGD"}, "train_batch_size": 1}
    with pytest.raises(ConfigError) as error:
        resolved(config)
    assert str(error.value).startswith("3 problems in deepspeed_configs/zero2_config.json\n  ")
    assert len(str(error.value).splitlines()) == 4


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "no such file; those that come with this code are in deepspeed_configs/"),
        ("{\n  'stage': 2\n}", ":2: is not JSON (Expecting property name enclosed in double quotes)"),
        ("[]", "must be an object"),
        ('{"bf16": {}, "bf16": {}}', "bf16 stands there twice; keep one"),
        (
            '{"zero_optimization": {"stage": 2, "overlap_com": true}}',
            "zero_optimization.overlap_com = True: extra inputs",
        ),
        ('{"zero_optimization": {"stage": 7}}', "zero_optimization.stage = 7: input should be 0, 1, 2"),
        ('{"fp16": {"enabled": true}}', "dtype = 'float16': a CPU lacks it; use bfloat16 or float32"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_bad_json_ends_every_rank_with_one_message(tmp_path, data, text, message):
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    given = {"deepspeed_config": path, "gradient_accumulation_steps": 2}
    assert message in refused(tmp_path / "out", data, ranks=2, **given)
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_no_compiler_is_told_with_the_fix(tmp_path, data):
    env = {"CXX": "no-such-compiler", "TORCH_EXTENSIONS_DIR": str(tmp_path / "ops")}
    given = {"deepspeed_config": zero_json("zero2_offload"), "gradient_accumulation_steps": 2}
    told = refused(tmp_path / "out", data, ranks=2, env=env, **given)
    assert "cpu_adam" in told and "no compiler (no-such-compiler); apt-get install g++" in told
    config = json.loads((ROOT / zero_json("zero2_offload")).read_text())
    config["optimizer"]["params"]["torch_adam"] = True  # what the message says
    (tmp_path / "config.json").write_text(json.dumps(config))
    output = train(
        tmp_path / "out",
        data,
        env=env,
        ranks=2,
        deepspeed_config=tmp_path / "config.json",
        gradient_accumulation_steps=2,
    )
    assert "zero2_offload: AdamW of torch" in output


def test_a_lock_that_a_killed_compilation_left_does_not_stop_the_next(tmp_path, data):
    """PyTorch's would be waited for for ever."""
    given = {"deepspeed_config": zero_json("zero3_nvme"), "nvme_path": tmp_path, "max_iters": 2}
    given["gradient_accumulation_steps"] = 2
    train(tmp_path / "first", data, ranks=2, **given)  # compiles what is not compiled yet
    ops = tmp_path / "ops"
    for op in ("cpu_adam", "async_io", "pin_memory"):
        shutil.copytree(_get_build_directory(op, verbose=False), ops / op)
        (ops / op / "lock").touch()
    (ops / "async_io" / "async_io.so").unlink()  # killed before it was linked
    output = train(tmp_path / "out", data, env={"TORCH_EXTENSIONS_DIR": str(ops)}, ranks=2, **given)
    assert "compiling async_io of DeepSpeed, once" in output and "compiling cpu_adam" not in output


def test_no_libaio_is_told_with_the_fix(tmp_path, data):
    """A machine without it is one whose linker does not find it."""
    compiler = tmp_path / "compiler"
    refuse = 'case " $* " in *" -laio "*) exit 1;; esac'
    compiler.write_text(f'#!/bin/sh\n{refuse}\nexec {shutil.which("c++")} "$@"\n')
    compiler.chmod(0o755)
    env = {"CC": str(compiler), "CXX": str(compiler), "TORCH_EXTENSIONS_DIR": str(tmp_path / "ops")}
    given = {"deepspeed_config": zero_json("zero3_nvme"), "nvme_path": tmp_path, "gradient_accumulation_steps": 2}
    told = refused(tmp_path / "out", data, ranks=2, env=env, **given)
    assert told == "async_io, a C++ op of DeepSpeed's that this run needs: no libaio; apt-get install libaio-dev"


def test_more_ranks_than_gpus_are_refused(tmp_path, data):
    given = {"device": "cuda", "deepspeed_config": zero_json("zero2"), "gradient_accumulation_steps": 2}
    told = refused(tmp_path / "out", data, ranks=2, env={"CUDA_VISIBLE_DEVICES": ""}, **given)
    assert told == "2 ranks on this machine: 0 GPUs are visible; use fewer ranks, or --device=cpu"


def test_a_config_given_to_the_other_script_is_told_where_it_belongs():
    told = message(run("train.py", "config/train_gpt2_deepspeed_zero2.py"))
    assert "unknown key; it belongs to train_deepspeed.py and ./launch_deepspeed_*.sh" in told
    told = message(run("train_deepspeed.py", "config/train_gpt2_fsdp.py"))
    assert told.count("unknown key; it belongs to train.py and ./launch_fsdp.sh") == 3
