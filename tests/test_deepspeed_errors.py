"""Errors in DeepSpeed's JSON, and missing programs: one message with the fix, and every rank ends."""

import json
import os
import re
import shutil
import subprocess
import sys
from types import ModuleType
from typing import Any

import cpuinfo
import pytest
import torch
from torch.utils import cpp_extension
from torch.utils.cpp_extension import _get_build_directory

from tests.running import ROOT, message, refused, run, train, zero_json
from tests.test_deepspeed_config import resolved
from training import deepspeed_engine
from training.deepspeed_json import read
from training.distributed import SINGLE_PROCESS
from training.errors import ConfigError

OFFLOAD = {"zero_optimization": {"stage": 1, "offload_param": {"device": "cpu"}}}
CASES: list[tuple[dict[str, Any], str]] = [
    ({"zero_optimisation": {}}, "zero_optimisation: unknown key; did you mean zero_optimization?"),
    ({"optimizer": {"type": "AdamW", "parms": {}}}, "optimizer.parms: unknown key; did you mean params?"),
    ({"flops_profiler": {"enable": True}}, "flops_profiler.enable: unknown key; did you mean enabled?"),
    ({"amp": {"enabled": True}}, "amp: unknown key; remove it"),
    ({"optimizer": {"type": "Lamb"}}, "optimizer.type = 'Lamb': must be AdamW"),
    (
        {"gradient_checkpointing": True},
        "gradient_checkpointing: not supported, as DeepSpeed has no such key (set --activation_checkpointing=True)",
    ),
    (
        {"pipeline": {"stages": 2}},
        "pipeline: not supported, as it follows from the model (set --pipeline_parallel=N); remove",
    ),
    (
        {"checkpoint": {"load_universal": True, "tag_validation": "Fail", "use_node_local_storage": False}},
        "checkpoint.load_universal: not supported, as it runs code in the files (any strategy resumes any checkpoint",
    ),
    (
        {"checkpoint": {"use_node_local_storage": True, "load_universal": False}},
        "in ds.json\n  checkpoint.use_node_local_storage: not supported, as the nodes would overwrite each other",
    ),
    (
        {"zero_optimization": {"stage": 2, "elastic_checkpoint": True}},
        "zero_optimization.elastic_checkpoint: not supported, as its files cannot be resumed (any number of ranks",
    ),
    (  # it offloads, and the strategy's name would not say so
        {"zero_optimization": {"stage": 2, "cpu_offload": True}},
        'cpu_offload: not supported, as it is an old key (write "offload_optimizer": {"device": "cpu"}); remove it',
    ),
    (
        {"zero_optimization": {"stage": 3, "cpu_offload_param": True}},
        'cpu_offload_param: not supported, as it is an old key (write "offload_param": {"device": "cpu"}); remove it',
    ),
    ({"wandb": {"enabled": True}}, "wandb.enabled: not supported, as this code logs itself (set --wandb_log=True)"),
    (
        {"optimizer": {"type": "AdamW", "params": {"torch_adam": False, "fused": True}}},
        'optimizer.params.fused: is a setting of torch\'s AdamW; write "torch_adam": true, or remove it',
    ),
    (  # the Trainer has no automatic value for it either
        {"flops_profiler": {"profile_step": "auto"}},
        'flops_profiler.profile_step = "auto": must be an integer, 0 or more',
    ),
    (OFFLOAD, "offload_param.device = 'cpu': needs stage 3, stage is 1; set it, or remove the block"),
    (
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme", "nvme_path": "/"}}},
        "offload_optimizer.device = 'nvme': needs stage 3, stage is 2",
    ),
    (
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/no/disk"}}},
        "nvme_path = '/no/disk': no such folder; set --nvme_path to one on a local NVMe disk",
    ),
    (
        {"gradient_clipping": 0.5},
        'gradient_clipping = 0.5: contradicts grad_clip = 1.0 in the settings; write "auto"',
    ),
    (
        {"optimizer": {"type": "AdamW", "params": {"lr": 1}}},
        "optimizer.params.lr = 1: contradicts learning_rate = 0.001 in the settings",
    ),
    (
        {"activation_checkpointing": {"partition_activations": True}, "activation_checkpointing=": False},
        "activation_checkpointing: contradicts activation_checkpointing = False in the settings; remove the block",
    ),
    (
        {"activation_checkpointing": {"contiguous_memory_optimization": True, "number_checkpoints": 5}},
        "number_checkpoints = 5: contradicts n_layer = 2 in the settings",
    ),
    (
        {"bf16": {"enabled": True}, "dtype=": "float32"},
        "bf16.enabled = true: contradicts dtype = float32 in the settings",
    ),
]


# Files whose syntax is right and whose values are of another kind than DeepSpeed's; all of their problems are told.
WRONG_KINDS = {
    '{"bf16": true, "zero_optimization": 2, "optimizer": "AdamW", "scheduler": [], "wandb": "auto", "aio": 1e9}': """
        bf16 = true: must be an object
        zero_optimization = 2: must be an object
        optimizer = "AdamW": must be an object
        scheduler = []: must be an object
        wandb = "auto": must be an object
        aio = 1000000000.0: must be an object""",
    '{"steps_per_print": 0, "train_batch_size": "32", "gradient_clipping": "1", "dump_state": 1, "log_level": 3}': """
        steps_per_print = 0: must be an integer, 1 or more
        train_batch_size = "32": must be an integer, 1 or more
        gradient_clipping = "1": must be a number, 0.0 or more
        dump_state = 1: must be true or false
        log_level = 3: must be one of ('debug', 'info', 'warning', 'error', 'critical')""",
    '{"zero_optimization": {"stage": true, "offload_optimizer": "cpu", "offload_param": {"nvme_path": [1]}}}': """
        zero_optimization.stage = true: must be one of (0, 1, 2, 3)
        zero_optimization.offload_optimizer = "cpu": must be an object
        zero_optimization.offload_param.nvme_path = [1]: must be a string""",
    '{"optimizer": {"type": 1, "params": {"betas": {}, "eps": -1}}, "zero_optimization": {"stage": "2"}}': """
        optimizer.type = 1: must be a string
        optimizer.params.betas = {}: must be a list
        optimizer.params.eps = -1: must be a number, 0.0 or more
        zero_optimization.stage = "2": must be one of (0, 1, 2, 3)""",
    '{"flops_profiler": {"module_depth": "-1"}, "timers": {"throughput": 1}, "amp": 1, "foo": {"bf16": 1}}': """
        flops_profiler.module_depth = "-1": must be an integer, -1 or more
        timers.throughput = 1: must be an object
        amp: unknown key; remove it
        foo: unknown key; remove it""",
}


@pytest.mark.parametrize("text", WRONG_KINDS, ids=lambda text: text[:40])
def test_values_of_a_wrong_kind(tmp_path, text):
    (tmp_path / "ds.json").write_text(text)
    with pytest.raises(ConfigError) as error:
        read(str(tmp_path / "ds.json"))
    assert [line.strip() for line in str(error.value).splitlines()[1:]] == WRONG_KINDS[text].split("\n        ")[1:]


def test_a_null_is_left_out(tmp_path):
    (tmp_path / "ds.json").write_text('{"optimizer": null, "bf16": {"enabled": null}, "steps_per_print": null}')
    assert read(str(tmp_path / "ds.json")) == {"bf16": {}}


@pytest.mark.parametrize(
    "content, told",
    [
        (b'{"gradient_clipping": NaN}', "gradient_clipping = NaN: must be a number, 0.0 or more"),
        (b'{"steps_per_print": 1e999}', "steps_per_print = Infinity: must be an integer, 1 or more"),
        (b'{"aio": {"block_size": ' + b"9" * 5000 + b"}}", "ds.json: Exceeds the limit (4300 digits) for integer"),
        (b'{"zero_optimization": ' + b"[" * 5000 + b"]" * 5000 + b"}", "ds.json: maximum recursion depth exceeded"),
        (b'{"x": "\xff"}', "ds.json: 'utf-8' codec can't decode byte 0xff"),
        (b'"bf16"', "ds.json: the file must be an object, {...}"),
        (b'{"scheduler": {"type": "Cosine"}}', "scheduler.type = \"Cosine\": must be one of ('LRRangeTest',"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_files_that_are_no_json_of_deepspeed(tmp_path, content, told):
    (tmp_path / "ds.json").write_bytes(content)
    with pytest.raises(ConfigError) as error:
        read(str(tmp_path / "ds.json"))
    assert told in str(error.value)


@pytest.mark.parametrize("config, message", CASES, ids=lambda value: str(value)[:40])
def test_errors_have_the_fix(config, message):
    given = {name.rstrip("="): value for name, value in config.items() if name.endswith("=")}  # on the command line
    with pytest.raises(ConfigError) as error:
        resolved({name: value for name, value in config.items() if not name.endswith("=")}, **given)
    assert message in str(error.value), error.value


def test_all_problems_are_reported_at_once():
    config: dict[str, Any] = {"foo": 1, "optimizer": {"type": "SGD"}, "train_batch_size": 1, "fp16": {"enabled": True}}
    config["zero_optimization"] = {"stage": 1}
    with pytest.raises(ConfigError) as error:
        resolved(config)
    first, *problems = str(error.value).splitlines()
    assert first == "4 problems in ds.json" and len(problems) == 4
    assert '  fp16.enabled = true: not supported by this CPU; write "bf16": {"enabled": true} instead' in problems


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "no such file; deepspeed_configs/ has one for each strategy"),
        ("{\n  'stage': 2\n}", ":2: not valid JSON (Expecting property name enclosed in double quotes)"),
        ("[]", "must be an object"),
        ('{"bf16": {}, "bf16": {}}', "duplicate key 'bf16'; keep one"),
        (
            '{"zero_optimization": {"stage": 2, "overlap_com": true}, "csv_monitor": {"enabled": "perhaps"}, '
            '"scheduler": {"type": "WarmupLR", "params": {"x": 1}}}',
            "config.json\n  zero_optimization.overlap_com = True: Extra inputs are not permitted\n"
            "  csv_monitor.enabled = 'perhaps': Input should be a valid boolean, unable to interpret input\n"
            "  scheduler.params: WarmupLR.__init__() got an unexpected keyword argument 'x'",
        ),
        (
            '{"zero_optimization": {"stage": 3, "mics_shard_size": 2}}',
            "zero_optimization.mics_shard_size: not supported, as DeepSpeed has removed it",
        ),
        ('{"zero_optimization": {"stage": 7}}', "zero_optimization.stage = 7: must be one of (0, 1, 2, 3)"),
        (
            '{"fp16": {"enabled": true}, "zero_optimization": {"stage": 1}}',
            'config.json\n  fp16.enabled = true: not supported by this CPU; write "bf16"',
        ),
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


def test_a_bad_block_is_named_where_ranks_share_the_model(tmp_path, data):
    """The JSON of DeepSpeed then has no train_batch_size, which would count all ranks."""
    path = tmp_path / "config.json"
    path.write_text('{"zero_optimization": {"stage": 1, "overlap_com": true}, "optimizer": {"type": "AdamW"}}')
    given = {"deepspeed_config": path, "gradient_accumulation_steps": 2, "tensor_parallel": 2}
    told = refused(tmp_path / "out", data, ranks=2, **given)
    assert told.endswith("config.json\n  zero_optimization.overlap_com = True: Extra inputs are not permitted")


def test_a_missing_compiler_is_reported_with_the_fix(tmp_path, data):
    env = {"CXX": "no-such-compiler", "TORCH_EXTENSIONS_DIR": str(tmp_path / "ops")}
    given = {"deepspeed_config": zero_json("zero2_offload"), "gradient_accumulation_steps": 2}
    told = refused(tmp_path / "out", data, ranks=2, env=env, **given)
    assert "cpu_adam" in told and "no compiler (no-such-compiler); apt-get install g++" in told
    config = json.loads((ROOT / zero_json("zero2_offload")).read_text())
    config["optimizer"]["params"]["torch_adam"] = True  # the fix in the message
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


def test_a_lock_left_by_a_killed_compilation_is_ignored(tmp_path, data):
    """PyTorch would wait for its own lock forever."""
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


def test_a_missing_libaio_is_reported_with_the_fix(tmp_path, data):
    """The compiler below fails to link it, as where it is not installed."""
    compiler = tmp_path / "compiler"
    refuse = 'case " $* " in *" -laio "*) exit 1;; esac'
    compiler.write_text(f'#!/bin/sh\n{refuse}\nexec {shutil.which("c++")} "$@"\n')
    compiler.chmod(0o755)
    env = {"CC": str(compiler), "CXX": str(compiler), "TORCH_EXTENSIONS_DIR": str(tmp_path / "ops")}
    given = {"deepspeed_config": zero_json("zero3_nvme"), "nvme_path": tmp_path, "gradient_accumulation_steps": 2}
    told = refused(tmp_path / "out", data, ranks=2, env=env, **given)
    assert told == "cannot compile async_io, a C++ op of DeepSpeed: libaio is missing; apt-get install libaio-dev"
    assert not list((tmp_path / "ops").rglob("*.o")), "something was compiled before"


def test_an_op_for_gpus_without_a_cuda_toolkit(tmp_path, monkeypatch):
    """A folder of CUDA without the compiler, as in a runtime container, is not enough."""
    code = (
        "import deepspeed\nfrom training import deepspeed_engine as engine\nfrom training.errors import UserError\n"
        "try: engine.build('fused_adam', 'FusedAdamBuilder', deepspeed)\n"
        "except UserError as error: print('told:', error)"
    )
    env = {**os.environ, "DS_ACCELERATOR": "cuda", "CUDA_HOME": str(tmp_path), "TORCH_CUDA_ARCH_LIST": "9.0"}
    env["TORCH_EXTENSIONS_DIR"] = str(tmp_path / "ops")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    (told,) = re.findall("told: (.*)", done.stdout) or [done.stdout + done.stderr]
    assert told.startswith("cannot compile fused_adam, a C++ op of DeepSpeed: no CUDA toolkit (")
    assert told.endswith('and set CUDA_HOME; or set "torch_adam": true in optimizer.params')
    missing = TypeError("expected str, bytes or os.PathLike object, not NoneType")  # DeepSpeed's, without CUDA_HOME
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    assert deepspeed_engine.reason("async_io", missing, "cuda").startswith("no CUDA toolkit (")


def test_an_op_that_was_installed_with_deepspeed_needs_no_compiler(tmp_path, monkeypatch):
    """DS_BUILD_OPS=1 compiled it where libaio's headers were; here is no compiler at all."""
    import deepspeed
    from deepspeed.ops.op_builder.builder import OpBuilder

    built, accelerator = deepspeed.git_version_info, deepspeed.accelerator.get_accelerator()
    builders = {"async_io": "AsyncIOBuilder", "pin_memory": "PinMemoryBuilder"}
    names = {op: accelerator.create_op_builder(builder).absolute_name() for op, builder in builders.items()}
    modules = {op: ModuleType(name) for op, name in names.items()}
    monkeypatch.setattr(OpBuilder, "_loaded_ops", {})
    monkeypatch.setattr(built, "accelerator_name", accelerator._name)
    monkeypatch.setitem(built.torch_info, "version", ".".join(torch.__version__.split(".")[:2]))
    for op, module in modules.items():
        monkeypatch.setitem(built.installed_ops, op, True)
        monkeypatch.setitem(sys.modules, names[op], module)
    monkeypatch.setattr(cpuinfo, "get_cpu_info", dict)  # takes a second
    for name, value in {"CC": "false", "CXX": "false", "TORCH_EXTENSIONS_DIR": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    config = {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}
    deepspeed_engine.load(deepspeed, config, SINGLE_PROCESS)
    assert OpBuilder._loaded_ops == modules


def test_more_ranks_than_gpus_are_rejected(tmp_path, data):
    given = {"device": "cuda", "deepspeed_config": zero_json("zero2"), "gradient_accumulation_steps": 2}
    told = refused(tmp_path / "out", data, ranks=2, env={"CUDA_VISIBLE_DEVICES": ""}, **given)
    assert told == "2 ranks on this machine: 0 GPUs are visible; use fewer ranks, or --device=cpu"


def test_a_config_of_the_other_script_is_reported_as_such():
    told = message(run("train.py", "config/train_gpt2_deepspeed_zero2.py"))
    assert "unknown key; it belongs to train_deepspeed.py and ./launch_deepspeed_*.sh; run one of them" in told
    told = message(run("train_deepspeed.py", "config/train_gpt2_fsdp.py"))
    assert "unknown key; it belongs to train.py and ./launch_fsdp.sh" in told
