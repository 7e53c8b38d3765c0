"""Every strategy's checkpoint, gone on from by every strategy: 15 + 15 steps against 30 in one go.

    python -m tests.resume_matrix results/resume_matrix

In fp32 the targets are all strategies on 1, 2 and 4 ranks, and the reference is one process. In bf16 they are the
sources themselves, and there are two references: one process, and the target's own 30 steps; for what computes the loss
after the switch is the target's arithmetic. Every run is a launch as a user's. Writes matrix.json and matrix.md.

`forgotten` says what a cell would be if AdamW's moments did not come along.
"""

import argparse
import json
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from tests.running import ROOT, TINY, losses, run, strategy_settings
from tests.words import words
from training import model_state
from training.checkpoint import Checkpoints, Saver
from training.distributed import SINGLE_PROCESS
from training.run_folder import environment

HALF, END = 15, 30
SETTINGS: dict[str, Any] = {**TINY, "gradient_accumulation_steps": 4, "log_interval": 1}
Run = tuple[str, int]  # strategy, ranks
SINGLE: Run = ("single", 1)
SOURCES = [SINGLE, ("ddp", 2), ("fsdp", 2), ("zero1", 2), ("zero2", 4), ("zero3", 2), ("zero3_offload", 2)]
KINDS = [strategy for strategy, _ in SOURCES[1:]]
# One process of DDP is `single`.
TARGETS = [SINGLE, *((kind, ranks) for kind in KINDS for ranks in (1, 2, 4) if (kind, ranks) != ("ddp", 1))]
Cell = dict[str, Any]


@dataclass
class Matrix:
    scratch: Path
    data: Path
    dtype: str
    jobs: int

    def folder(self, *runs: Run) -> Path:
        """Of the run that goes through those, one after the other."""
        return self.scratch / self.dtype / "-".join(f"{strategy}_{ranks}" for strategy, ranks in runs) / "out"

    def train(self, folder: Path, what: Run, **settings) -> None:
        """RuntimeError with what the run said where it fails."""
        strategy, ranks = what
        folder.parent.mkdir(parents=True, exist_ok=True)
        given = {**SETTINGS, "dataset": self.data, "dtype": self.dtype, **strategy_settings(strategy, folder.parent)}
        script = "train_deepspeed.py" if strategy.startswith("zero") else "train.py"
        done = run(script, ranks=0 if ranks == 1 else ranks, **{**given, "out_dir": folder, **settings})
        if done.returncode:
            raise RuntimeError(f"{strategy} on {ranks} ranks: {done.stdout}{done.stderr}")
        about = Checkpoints(str(folder)).newest()[1]
        assert (about["strategy"], about["world_size"]) == what, f"{folder} is of {about['strategy']}, not {what}"

    def cell(self, source: Run, target: Run, references: dict[str, Run], half: str = "half") -> Cell:
        """The largest differences of losses and gradient norms after the switch from each reference."""
        folder = self.folder(source, target)
        shutil.copytree(self.folder(source) / half, folder)
        self.train(folder, target, init_from="resume")
        found: Cell = dict(zip(("source", "source_ranks", "target", "target_ranks"), (*source, *target), strict=True))
        for what in ("loss", "grad_norm"):
            ours = losses(folder, what)
            assert list(ours) == list(range(END)), f"{folder}: steps {list(ours)}"
            for name, reference in references.items():
                theirs = losses(self.folder(reference), what)
                found[f"{what}_to_{name}"] = max(abs(ours[step] - theirs[step]) for step in range(HALF, END))
        shutil.rmtree(folder)
        return found

    def forgotten(self) -> Cell:
        """One process goes on without its moments."""
        path, about = Checkpoints(str(self.folder(SINGLE) / "half")).newest()
        state = model_state.read_torch_file(path / "optimizer.pt")
        for moments in state["optimizer"].values():
            moments |= {kind: torch.zeros_like(value) for kind, value in moments.items()}
        forgotten = Checkpoints(str(self.folder(SINGLE) / "forgotten"))
        with Saver(forgotten).writing({**about, "files": {}, "crc32": {}}, best=False) as written:
            written.write("model.pt", model_state.read_torch_file(path / "model.pt"))
            written.write("optimizer.pt", state)
        shutil.copy(self.folder(SINGLE) / "half" / "metrics.jsonl", forgotten.out_dir)
        return self.cell(SINGLE, SINGLE, {"single": SINGLE}, "forgotten")

    def cells(self, targets: list[Run], own: bool) -> list[Cell]:
        """own: to compare with the 30 steps of the target and of the source as well."""
        with ThreadPoolExecutor(self.jobs) as pool:
            list(pool.map(lambda whole: self.train(self.folder(whole), whole), SOURCES if own else [SINGLE]))
            list(pool.map(lambda of: self.train(self.folder(of) / "half", of, max_iters=HALF), SOURCES))
            pairs = [(of, to, {"target": to, "source": of} if own else {}) for of in SOURCES for to in targets]
            done = [pool.submit(self.cell, of, to, {"single": SINGLE, **others}) for of, to, others in pairs]
            return [cell.result() for cell in tqdm(done, desc=self.dtype, unit="cell")]


def title(what: Run) -> str:
    return what[0] if what == SINGLE else f"{what[0]} x{what[1]}"


def table(cells: list[Cell], key: str) -> str:
    """Rows are sources, columns targets."""
    targets = list(dict.fromkeys((cell["target"], cell["target_ranks"]) for cell in cells))
    lines = [["from \\ to", *map(title, targets)], ["---"] * (len(targets) + 1)]
    for source in SOURCES:
        row = [cell for cell in cells if (cell["source"], cell["source_ranks"]) == source]
        lines.append([title(source), *(f"{cell[key]:.1e}" for cell in row)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def report(found: dict[str, list[Cell]]) -> str:
    of = {"loss": "loss", "grad_norm": "gradient norm"}
    text = [f"# {HALF} + {HALF} steps against {END}\n"]
    for dtype, cells in found.items():
        for key in [key for key in cells[0] if "_to_" in key]:
            what, _, reference = key.partition("_to_")
            goal = "one process" if reference == "single" else f"the {reference}'s own {END} steps"
            text += [f"{dtype}, {of[what]}: largest difference from {goal}, {max(cell[key] for cell in cells):.1e}\n"]
            text += [table(cells, key)]
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="folder for matrix.json and matrix.md")
    parser.add_argument("--jobs", type=int, default=2, help="launches at a time")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        matrix = Matrix(Path(name), words(Path(name) / "words"), "float32", args.jobs)
        found = {"float32": matrix.cells(TARGETS, own=False)}
        forgotten = matrix.forgotten()
        found["bfloat16"] = replace(matrix, dtype="bfloat16").cells(SOURCES, own=True)
    about = {"settings": {**SETTINGS, "dataset": "tests/words.py"}, "forgotten": forgotten}
    about["environment"] = {
        **environment(SINGLE_PROCESS),
        "command": ["python", "-m", "tests.resume_matrix", *sys.argv[1:]],
    }
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / "matrix.json").write_text(json.dumps({**about, **found}, indent=1) + "\n")
    (args.results / "matrix.md").write_text(report(found))
    print(report(found))


if __name__ == "__main__":
    assert Path.cwd() == ROOT, f"run it in {ROOT}"
    main()
