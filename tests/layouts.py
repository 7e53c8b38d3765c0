"""The losses of every layout of ranks against one process: 30 steps in fp32 on CPU ranks, with clipping active.

    python -m tests.layouts results/layouts

Then 15 + 15 steps, from each layout to each other. Takes some 20 minutes. Writes README.md.
"""

import shutil
import sys
from pathlib import Path
from typing import Any

from tests.running import difference, losses, rows, train, zero_json
from tests.words import words
from training.distributed import SINGLE_PROCESS
from training.run_folder import environment

RUN: dict[str, Any] = {"gradient_accumulation_steps": 4, "n_layer": 4, "n_head": 8, "n_embd": 64, "eval_iters": 4}
RUN |= {"log_interval": 1, "eval_interval": 30}
LLAMA = {"norm": "rmsnorm", "mlp": "swiglu", "n_hidden": 96, "n_kv_head": 4, "rope_theta": 1e4, "tied": False}
EXPERTS = {**LLAMA, "n_expert": 4, "n_hidden": 64}
MODELS: dict[str, dict[str, Any]] = {"GPT-2": {"bias": True}, "Llama": {**LLAMA, "qk_norm": True}, "experts": EXPERTS}
# ranks, strategy, sizes of the layout
DENSE: list[tuple[int, str, dict[str, int]]] = [
    *[(2, strategy, {"sequence": 2}) for strategy in ("ddp", "fsdp", "zero1", "zero3")],
    *[(2, strategy, {"tensor": 2}) for strategy in ("zero1", "zero2", "zero3", "zero2_offload")],
    *[(4, strategy, {"tensor": 2}) for strategy in ("zero1", "zero3")],
    *[(4, strategy, {"tensor": 2, "sequence": 2}) for strategy in ("zero1", "zero3")],
    *[(ranks, "zero1", {"pipeline": stages}) for ranks, stages in ((2, 2), (4, 2), (4, 4))],
    *[(4, "zero1", {"pipeline": 2, other: 2}) for other in ("tensor", "sequence")],
    (8, "zero1", {"pipeline": 2, "tensor": 2}),
]
SPARSE: list[tuple[int, str, dict[str, int]]] = [
    *[(2, strategy, {}) for strategy in ("ddp", "fsdp")],
    *[(ranks, f"zero{stage}", {"expert": 2}) for ranks in (2, 4) for stage in (1, 2, 3)],
    *[(ranks, "zero3", {"expert": 2, "tensor": 2}) for ranks in (2, 4)],
    (4, "zero1", {"expert": 2, "pipeline": 2}),
]


def compare(folder: Path, data: Path, model: str, ranks: int, strategy: str, layout: dict[str, int]) -> str:
    """A row of the table: largest differences of the loss and, relative to it, of the gradient norm."""
    settings = {**RUN, **MODELS[model], **{f"{name}_parallel": size for name, size in layout.items()}}
    if strategy.startswith("zero"):
        settings["deepspeed_config"] = zero_json(strategy)
    elif strategy == "fsdp":
        settings["strategy"] = strategy
    if model == "experts" and "pipeline" in layout:
        settings["expert_balance"] = 0.0
    balance = settings.get("expert_balance", 0.01)
    single = folder / f"{model}-single-{balance}"
    if not single.exists():
        own = {"expert_balance": balance} if model == "experts" else {}
        train(single, data, **{**RUN, **MODELS[model], **own})
    name = "-".join([model, strategy, str(ranks), *(f"{kind}{size}" for kind, size in layout.items())])
    train(folder / name, data, ranks=ranks, **settings)
    norms = [[row["grad_norm"] for row in rows(run, "train")] for run in (single, folder / name)]
    assert len(losses(single)) == 30 and max(norms[0]) > 1, "clipping was not active"
    norm = max(abs(a - b) / a for a, b in zip(*norms, strict=True))
    text = " x ".join(f"{size} {kind}" for kind, size in layout.items()) or "data only"
    return f"| {model} | {strategy} | {ranks} | {text} | {difference(single, folder / name):.1e} | {norm:.1e} |"


MATRIX: dict[str, tuple[int, str, dict[str, int]]] = {
    "single": (0, "single", {}),
    **{strategy: (2, strategy, {}) for strategy in ("ddp", "fsdp", "zero1", "zero3")},
    "tp2": (2, "zero1", {"tensor": 2}),
    "pp2 x tp2": (4, "zero1", {"pipeline": 2, "tensor": 2}),
    "ep2 x dp2": (4, "zero2", {"expert": 2}),
}
# AutoEP and a pipeline have no balance loss here
MATRICES = {"GPT-2": [name for name in MATRIX if name != "ep2 x dp2"]}
MATRICES["experts"] = [name for name in MATRIX if name not in ("tp2", "pp2 x tp2")]


def resume_matrix(folder: Path, data: Path, model: str) -> list[str]:
    """A table of the largest difference of the loss from one process after the switch: rows from, columns to."""
    names, settings = MATRICES[model], {**RUN, **MODELS[model]}
    whole = folder / f"{model}-single-0.01"  # of `compare`
    lines = [["from \\ to", *names], ["---"] * (len(names) + 1)]

    def go(out: Path, name: str, **more: Any) -> None:
        ranks, strategy, layout = MATRIX[name]
        own = {"deepspeed_config": zero_json(strategy)} if strategy.startswith("zero") else {}
        own |= {"strategy": "fsdp"} if strategy == "fsdp" else {}
        sizes = {f"{kind}_parallel": size for kind, size in layout.items()}
        train(out, data, ranks=ranks, **{**settings, **own, **sizes, **more})

    for source in names:
        half, cells = folder / f"{model}-{source}-half", [source]
        go(half, source, max_iters=15, eval_interval=15)
        for target in names:
            shutil.copytree(half, out := folder / "cell")
            go(out, target, resume="auto")
            cells.append(f"{difference(whole, out):.1e}")
            shutil.rmtree(out)
        lines.append(cells)
        print(cells, flush=True)
    return [f"| {' | '.join(line)} |" for line in lines]


def main() -> None:
    write = Path(sys.argv[1])
    write.mkdir(parents=True, exist_ok=True)
    scratch = Path(sys.argv[2]) if len(sys.argv) > 2 else write / "runs"
    data = words(scratch / "words")
    table = ["| model | strategy | ranks | split | loss | gradient norm, relative |", "|---|---|---|---|---|---|"]
    for model in MODELS:
        for case in SPARSE if model == "experts" else DENSE:
            table.append(compare(scratch, data, model, *case))
            print(table[-1], flush=True)
    about = environment(SINGLE_PROCESS)
    facts = [f"- {key}: {about[key]}" for key in ("started", "git_commit", "python", "torch", "deepspeed", "device")]
    title = "# Layouts against one process\n\nLargest differences over 30 steps, fp32, gradient clipping active.\n"
    table += [
        "",
        "## 15 steps under one layout, 15 under another",
        "",
        "Largest difference of the loss from one process.",
    ]
    for model in MATRICES:
        table += ["", f"{model}:", "", *resume_matrix(scratch, data, model)]
    (write / "README.md").write_text("\n".join([title, *table, "", *facts]) + "\n")


if __name__ == "__main__":
    main()
