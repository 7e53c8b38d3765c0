"""The tables of README.md and docs/ are those of results/, number by number."""

import json
import re
from collections.abc import Iterable

import pytest

from tests.resume_matrix import SOURCES, TARGETS, title
from tests.running import ROOT

README = (ROOT / "README.md").read_text()
CHECKPOINTS, CONVERT, NODES, RESULTS = (
    (ROOT / "docs" / f"{name}.md").read_text() for name in ("checkpoints", "convert", "multi_node", "results")
)
MB = 1e-6


def rows(name: str) -> list[dict]:
    return json.loads((ROOT / "results" / name / "benchmark.json").read_text())["rows"]


def table(page: str, title: str) -> list[list[str]]:
    """The cells of the first table of a page's section, without the head."""
    found = re.search(r"\n\n((?:\|.*\n)+)", page[page.index(f"# {title}\n") :])
    assert found, f"no table after {title!r}"
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in found[1].splitlines()[2:]]


def test_same_loss():
    found = [row for row in rows("parity") if row["strategy"] != "single"]
    cells = ("loss_difference", "grad_norm_difference")
    assert table(RESULTS, "Loss") == [
        [row["strategy"], str(row["ranks"]), *(f"{row[cell]:.1e}" for cell in cells)] for row in found
    ]


def test_memory():
    runs = [rows(f"zero_memory/{ranks}_ranks") for ranks in (1, 2, 4)]
    sizes = ("model_state_bytes", "expected_bytes")
    assert table(RESULTS, "Memory") == [
        [of_one[0]["strategy"], *(f"{MB * row[size]:.1f}" for row in of_one for size in sizes)]
        for of_one in zip(*runs, strict=True)
    ]


def speed(row: dict) -> list[str]:
    low, high = row["tokens_per_second_quartiles"]
    rates = [f"{row['tokens_per_second']:,.0f}", f"{low:,.0f} to {high:,.0f}", f"{row['steps_per_second_ratio']:.2f}"]
    sizes = [f"{MB * row[size]:,.0f}" for size in ("peak_host_bytes", "model_state_bytes")]
    return [row["strategy"], *rates, *sizes, f"{row['start_s']:.1f}", f"{row['checkpoint_s']:.1f}"]


def test_speed():
    assert table(RESULTS, "Speed") == [speed(row) for row in rows("speed_124m")]


def test_overhead():
    launches = {row["strategy"]: row for row in rows("bare_124m")}
    steps = json.loads((ROOT / "results/bare_124m/overhead.json").read_text())["results"]
    expected = []
    for name, step in steps.items():
        ours, bare = launches[name], launches[f"tests.bare_loop {name}"]
        others = [ours[number] / bare[number] for number in ("peak_memory_bytes", "start_s")]
        expected.append([name, *(f"{ratio:.3f}" for ratio in (step["ratio"], *others))])
    assert table(RESULTS, "Overhead") == expected


def test_strategies_in_the_readme():
    """Loss difference in fp32 on 4 ranks; model state and tokens/s of GPT-2 124M on 2; blank if not measured."""
    losses = {row["strategy"]: f"{row['loss_difference']:.1e}" for row in rows("parity")}
    measured = {row["strategy"]: speed(row) for row in rows("speed_124m")}
    cells = table(README, "Strategies")
    assert {name for name, *_ in cells} == set(losses)
    for name, _, loss, memory, rate, _ in cells:
        _, tokens, _, _, _, state, *_ = measured.get(name, [""] * 8)
        assert (loss, memory, rate) == (losses[name], state, tokens), name


@pytest.mark.parametrize("name", ["parity", "speed_124m", "speed_4_ranks"])
def test_every_strategy_ran(name):
    failed = {row["strategy"]: row["error"] for row in rows(name) if row["status"] != "ok"}
    assert not failed and len(rows(name)) >= 12, failed


def test_slow_links():
    found = json.loads((ROOT / "results/slow_links/results.json").read_text())["results"]
    for method, by_rate in found.items():
        speeds = " | ".join(f"{rate['tokens_per_second']:,.0f}" for rate in by_rate.values())
        slowest = by_rate["100mbit"]
        row = f"| {method} | {speeds} | {slowest['megabytes_per_step']:.2f} | {slowest['val_loss']:.4f} |\n"
        assert row in (ROOT / "docs/parallelism.md").read_text(), method


def test_links():
    runs = [rows(f"zero_links/{rate}") for rate in ("10gbit", "1gbit", "100mbit")]
    assert table(NODES, "Network bandwidth") == [
        [of_one[0]["strategy"], *(f"{1e3 / row['step_ms']:.2f}" for row in of_one)]
        for of_one in zip(*runs, strict=True)
    ]


def ends(cell: dict) -> tuple[tuple[str, int], tuple[str, int]]:
    return (cell["source"], cell["source_ranks"]), (cell["target"], cell["target_ranks"])


def test_what_converting_costs():
    source, *found = json.loads((ROOT / "results" / "convert" / "convert.json").read_text())["rows"]
    assert table(CONVERT, "Cost") == [
        [row["what"], f"{row['cpu_seconds']:.1f}", *(f"{MB * row[key]:,.0f}" for key in ("peak_bytes", "target_bytes"))]
        for row in found
        if row["what"] != "safetensors, not verified"  # which earlier versions could do
    ]
    for key in ("bytes", "largest_tensor", "largest_shard"):
        assert f"{MB * source[key]:,.0f} MB" in CONVERT
    peaks = {row["what"]: row["peak_bytes"] - found[0]["peak_bytes"] for row in found}
    sizes = {row["what"]: row["target_bytes"] for row in found}
    assert peaks["safetensors"] < 1.2 * sizes["safetensors"], "more than the file in memory"
    assert peaks["train"] < 1.2 * sizes["train"], "more than weights and moments"


def test_what_a_save_takes():
    found = json.loads((ROOT / "results" / "save_cost" / "save_cost.json").read_text())["rows"]
    seconds = ("step_s", "at_once_s", "later_s", "longer_steps_s")
    assert table(CHECKPOINTS, "Cost of a save") == [
        [row["strategy"], f"{MB * row['bytes']:,.0f}", *(f"{row[key]:.2f}" for key in seconds)] for row in found
    ]
    shorter = sorted(row["at_once_s"] / row["later_s"] for row in found)
    assert f"The pause is {shorter[0]:.1f} to {shorter[-1]:.1f} times shorter" in CHECKPOINTS


def largest(cells: Iterable[dict], key: str) -> float:
    return max(cell[key] for cell in cells)


def test_a_run_goes_on_anywhere():
    found = json.loads((ROOT / "results" / "resume_matrix" / "matrix.json").read_text())
    cells, expected, norm = found["float32"], [], "grad_norm_to_single"
    assert [*map(ends, cells)] == [(source, target) for source in SOURCES for target in TARGETS]
    assert all(cell["loss_to_single"] <= 1e-5 and cell[norm] <= 1e-5 for cell in cells)
    for source in SOURCES:
        row = {target: cell for cell in cells for of, target in [ends(cell)] if of == source}
        any_of = [largest((row[to] for to in row if to[1] == ranks), norm) for ranks in (1, 2, 4)]
        numbers = [*(row[target][norm] for target in SOURCES), *any_of]
        expected.append([title(source), *(f"{1e7 * number:.1f}" for number in numbers)])
    assert table(CHECKPOINTS, "Resume matrix") == expected
    halves = found["bfloat16"]
    assert [*map(ends, halves)] == [(source, target) for source in SOURCES for target in SOURCES]
    assert largest(halves, "loss_to_single") <= 0.02, "bf16's bound of small models"
    assert largest(halves, "loss_to_target") <= 0.002, "a tenth of what moments that were lost would do"
    forgotten = found["forgotten"]["loss_to_single"]
    assert forgotten > 0.02, "the model is one that goes on as well without its moments"
    autocast = [cell for cell in halves if cell["target"] in ("single", "ddp")]
    others = [cell for cell in halves if cell not in autocast]
    quoted = [largest(cells, "loss_to_single"), forgotten]
    quoted += [largest(part, "loss_to_single") for part in (autocast, others)] + [largest(halves, "loss_to_target")]
    section = CHECKPOINTS[CHECKPOINTS.index("# Resume matrix") :]
    assert re.findall(r"\d\.\de-\d\d", section) == [f"{number:.1e}" for number in quoted]
