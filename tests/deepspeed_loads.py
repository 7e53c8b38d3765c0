"""What DeepSpeed itself makes of checkpoints that convert.py wrote: run by test_convert_deepspeed.py on two ranks.

launch.py 2 tests/deepspeed_loads.py FOLDER: FOLDER holds run, universal and what CASES names, all of one state.
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from model import GPT, GPTConfig
from training import distributed
from training.checkpoint import fill
from training.deepspeed_state import is_native, load_native, load_partition
from training.formats.options import Options
from training.formats.source import open_source
from training.model_state import SavedState
from training.optim import parameter_groups
from training.sharding import KINDS, WEIGHT

SUB_GROUP_SIZE = 6000  # several, as a large model has; and with the threshold, some stay whole on every rank
CASES = [(stage, dtype, False) for stage in (1, 2, 3) for dtype in ("float32", "bfloat16")]
CASES += [(stage, "float32", True) for stage in (1, 2, 3)]


def engine_of(
    deepspeed: Any, stage: int, dtype: str, universal: bool, config: GPTConfig, sub_group_size: int = SUB_GROUP_SIZE
) -> Any:
    zero = {"stage": stage, "stage3_param_persistence_threshold": 64, "sub_group_size": sub_group_size}
    about = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        "checkpoint": {"load_universal": universal},
    }
    about |= {"bf16": {"enabled": dtype == "bfloat16"}, "data_types": {"grad_accum_dtype": "fp32"}}
    if stage == 3:
        with deepspeed.zero.Init(config_dict_or_path=about):
            model = GPT(config)
    else:
        model = GPT(config).init_weights(7)
    groups = parameter_groups(model, 0.1)
    optimizer = torch.optim.AdamW(groups, lr=1e-3, fused=True)
    return deepspeed.initialize(model=model, model_parameters=groups, optimizer=optimizer, config=about)[0]


@torch.no_grad()
def check(engine: Any, stage: int, dtype: str, expected: SavedState, config: GPTConfig) -> None:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    steps = {float(state["step"]) for state in engine.optimizer.optimizer.state.values()}
    assert steps == {expected.step}, f"AdamW has counted {steps}"
    if stage < 3:  # its states are linked to parameters at the first step, and then all groups at once
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    for name, parameter in engine.module.named_parameters():
        for kind in KINDS:
            get = (
                safe_get_full_fp32_param
                if kind == WEIGHT
                else partial(safe_get_full_optimizer_state, optim_state_key=kind)
            )
            found = get(parameter)
            assert torch.equal(found.view(-1), expected.whole(name, kind).view(-1)), f"another {kind} of {name}"
    whole = GPT(config)
    fill(whole, expected.weights())
    tokens = torch.arange(config.block_size)[None] % 257
    engine.eval()
    ours, theirs = whole.eval()(tokens), engine(tokens).float()
    limit = 1e-5 if dtype == "float32" else 0.03 * ours.abs().max()
    assert (ours - theirs).abs().max() < limit, f"logits differ by {(ours - theirs).abs().max()}"


def main(folder: Path) -> None:
    with distributed.start("cpu", "gloo", alone=True) as ranks:
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiled at every start, for inference only
        deepspeed.init_distributed(verbose=False)
        expected, about = open_source(str(folder / "run"), Options())
        config = GPTConfig(**about["model"])
        for stage, dtype, universal in CASES:
            engine = engine_of(deepspeed, stage, dtype, universal, config)
            if stage == 3 and not universal:  # of other sub-groups than the checkpoint's: each rank takes its part
                other = engine_of(deepspeed, stage, dtype, universal, config, sub_group_size=10**9)
                path = folder / f"zero3-{dtype}/checkpoints/step_000003"
                assert not is_native(other, path)
                load_partition(other, path, ranks)
                check(other, stage, dtype, expected, config)
                other.destroy()
            path = folder / ("universal" if universal else f"zero{stage}-{dtype}/checkpoints/step_000003")
            if universal:
                engine.load_checkpoint(path)
            else:
                load_native(engine, path)
                groups = engine.optimizer.param_groups
                assert {(*group["betas"], group["lr"]) for group in groups} == {(0.9, 0.999, 6e-4)}, "not the run's own"
                assert [group["weight_decay"] for group in groups] == [0.1, 0.0], "not the run's own"
            assert engine.global_steps == about["step"], f"nothing was loaded of {path}"
            check(engine, stage, dtype, expected, config)
            if ranks.main:
                print(f"stage {stage} of {path}: equal", flush=True)
            engine.destroy()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
