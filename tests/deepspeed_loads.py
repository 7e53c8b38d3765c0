"""What DeepSpeed itself makes of checkpoints that convert.py wrote: run by test_convert_deepspeed.py on two ranks.

launch.py 2 tests/deepspeed_loads.py FOLDER: FOLDER holds run, zero1, zero2, zero3 and universal, all of one state.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from data.tokenizer import ByteTokenizer
from model import GPT, GPTConfig
from training import distributed
from training.formats.options import Options
from training.formats.source import open_source
from training.model_state import SavedState
from training.optim import parameter_groups
from training.sharding import KINDS, WEIGHT


def engine_of(deepspeed: Any, stage: int, config: GPTConfig, universal: bool) -> Any:
    zero = {"stage": stage, "stage3_param_persistence_threshold": 64}  # some stay whole on every rank
    about = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        "checkpoint": {"load_universal": universal},
    }
    if stage == 3:
        with deepspeed.zero.Init(config_dict_or_path=about):
            model = GPT(config)
    else:
        model = GPT(config).init_weights(7)
    groups = parameter_groups(model, 0.1)
    optimizer = torch.optim.AdamW(groups, lr=1e-3, fused=True)
    return deepspeed.initialize(model=model, model_parameters=groups, optimizer=optimizer, config=about)[0]


def check(deepspeed: Any, engine: Any, stage: int, expected: SavedState, config: GPTConfig) -> None:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    inner = engine.optimizer.optimizer
    steps = {float(state["step"]) for state in inner.state.values()}
    assert steps == {expected.step}, f"stage {stage}: AdamW has counted {steps}"
    if stage < 3:  # as shown in DeepSpeed's own code, states are linked to parameters at the first step
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    for name, parameter in engine.module.named_parameters():
        for kind in KINDS:
            found = (
                safe_get_full_fp32_param(parameter)
                if kind == WEIGHT
                else safe_get_full_optimizer_state(parameter, kind)
            )
            assert torch.equal(found.view(-1), expected.whole(name, kind).view(-1)), f"stage {stage}: {kind} of {name}"
    whole = GPT(config)
    whole.load_state_dict(expected.weights(), strict=False)
    tokens = torch.arange(config.block_size)[None] % ByteTokenizer.vocab_size
    difference = (engine.eval()(tokens) - whole.eval()(tokens)).abs().max()
    assert difference < 1e-5, f"stage {stage}: logits differ by {difference}"


def main(folder: Path) -> None:
    with distributed.start("cpu", "gloo", alone=True) as ranks:
        import deepspeed

        deepspeed.init_distributed(verbose=False)
        expected, about = open_source(str(folder / "run"), Options())
        config = GPTConfig(**about["model"])
        for stage in (1, 2, 3):
            for universal in (False, True):
                engine = engine_of(deepspeed, stage, config, universal)
                path = folder / "universal" if universal else folder / f"zero{stage}" / "checkpoints"
                loaded, _ = engine.load_checkpoint(path, tag=None if universal else "step_000003")
                assert loaded and engine.global_steps == about["step"], f"stage {stage}: nothing was loaded of {path}"
                with torch.no_grad():
                    check(deepspeed, engine, stage, expected, config)
                if ranks.main:
                    print(f"stage {stage}, universal {universal}: equal", flush=True)
                engine.destroy()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
