"""What a researcher changes, in a copy of the tree: each change touches one file, and the changed code trains."""

import filecmp
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.running import ROOT, TINY, command, difference, losses, rows, start_process

LION = '''

class Lion(torch.optim.Optimizer):
    """Chen et al., arXiv:2302.06675."""

    def __init__(self, groups, lr):
        super().__init__(groups, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(momentum.lerp(p.grad, 0.1).sign(), alpha=-group["lr"])
                    momentum.lerp_(p.grad, 0.01)
'''
ADAMW = (
    "    return make(parameter_groups(model, cfg), lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2), fused=True)\n"
)
MLP, STDS = "        self.mlp = MoE(config) if config.n_expert else MLP(config)\n", "    stds = dict.fromkeys("
LAYER_SCALE = [  # Touvron et al., arXiv:2103.17239
    (MLP, f"{MLP}        self.scale = nn.Parameter(torch.empty(config.n_embd))\n"),
    ("return x + self.mlp(self.ln_2(x))", "return x + self.scale * self.mlp(self.ln_2(x))"),
    (STDS, f'    if kind == "scale":\n        return torch.full(shape, 0.5)\n{STDS}'),
]
ZERO3 = "deepspeed_configs/zero3_config.json"
SHORT = {"gradient_accumulation_steps": 2, "max_iters": 15}
# name: (file, replacements or the whole text of a new file, how to train with it)
CHANGES: dict[str, tuple[str, Any, list[dict[str, Any]]]] = {
    "optimizer": (
        "training/optim.py",
        [
            (ADAMW, f"    return Lion(parameter_groups(model, cfg), cfg.learning_rate)\n{LION}"),
        ],
        [{}, {"strategy": "fsdp", "ranks": 2}],  # under ZeRO: tests/test_zero_runs.py
    ),
    "metric": (
        "train.py",
        [('"grad_norm": grad_norm}', '"grad_norm": grad_norm, "wte_norm": self.model.transformer.wte.weight.norm()}')],
        [{}, {"ranks": 2}, {"strategy": "fsdp", "ranks": 2}],
    ),
    "model option": (
        "model.py",
        LAYER_SCALE,
        [{}, {"strategy": "fsdp", "ranks": 2}, {"deepspeed_config": ZERO3, "ranks": 2}],
    ),
    "ZeRO JSON": (
        "deepspeed_configs/zero1_small_buckets_config.json",
        json.dumps({"zero_optimization": {"stage": 1, "reduce_bucket_size": 1000}}),
        [{"deepspeed_config": "deepspeed_configs/zero1_small_buckets_config.json", "ranks": 2}],
    ),
}


def changed_files(folder: Path) -> list[str]:
    paths = [
        path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    ]
    return [str(p) for p in paths if not (ROOT / p).exists() or not filecmp.cmp(ROOT / p, folder / p, shallow=False)]


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_touches_one_file(copy, tmp_path, data, name):
    file, change, runs = CHANGES[name]
    if isinstance(change, str):
        (copy / file).write_text(change)
    else:
        text = (copy / file).read_text()
        for old, new in change:
            assert text.count(old) == 1, f"{file} has {text.count(old)} times: {old}"
            text = text.replace(old, new)
        (copy / file).write_text(text)
    assert changed_files(copy) == [file]
    outs = []
    for number, settings in enumerate(runs):
        outs.append(tmp_path / str(number))
        settings = {**TINY, **SHORT, "dataset": data, "out_dir": outs[-1], **settings}
        settings |= {"learning_rate": 1e-4} if name == "optimizer" else {}
        script = "train_deepspeed.py" if "deepspeed_config" in settings else "train.py"
        line = command(script, ranks=settings.pop("ranks", 0), **settings)
        with start_process(line, cwd=copy, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
            errors = process.communicate(timeout=300)[1]
        assert process.returncode == 0, errors
        assert losses(outs[-1])[14] < losses(outs[-1])[0] - 0.05, "the changed code does not learn"
    for other in outs[1:]:
        assert difference(outs[0], other) <= 1e-5
    if name == "metric":
        assert all(row["wte_norm"] > 0 for row in rows(outs[0], "train"))
    if name == "ZeRO JSON":
        program = "from training.strategies import find_strategy; print(find_strategy('zero1_small_buckets').stage)"
        assert subprocess.run([sys.executable, "-c", program], cwd=copy, capture_output=True, text=True).stdout == "1\n"
