"""sample.py and tools.plot on a real run."""

import json
import os
import shutil
import subprocess

import pytest

from tests.running import ROOT, command, message, rows, run, train
from training import figures
from training.figures import read_run, step_size


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data):
    out_dir = tmp_path_factory.mktemp("runs") / "finished"
    train(out_dir, data, max_iters=40, lr_decay_iters=40, eval_interval=10)
    return out_dir


def sample(finished, *arguments, **settings):
    return run("sample.py", *arguments, out_dir=finished, max_new_tokens=40, device="cpu", **settings)


def test_samples_go_on_from_the_text_and_the_seed_decides(finished, tmp_path):
    done = sample(finished, num_samples=3, start="def ")
    assert done.returncode == 0 and done.stderr == ""
    texts = done.stdout.split("\n---------------\n")
    assert len(texts) == 4 and all(text.startswith("def ") for text in texts[:3])
    assert len(set(texts[:3])) == 3
    assert sample(finished, num_samples=3, start="def ").stdout == done.stdout
    assert sample(finished, num_samples=3, start="def ", seed=2).stdout != done.stdout
    (tmp_path / "prompt.txt").write_text("def ")
    assert sample(finished, num_samples=3, start=f"FILE:{tmp_path / 'prompt.txt'}").stdout == done.stdout


def test_greedy_text_is_one_text(finished):
    done = sample(finished, num_samples=2, start="import ", temperature=0)
    one, other, _ = done.stdout.split("\n---------------\n")
    assert one == other
    for likeliest in ({"top_k": 1}, {"top_k": 0, "top_p": 1e-6}):
        assert sample(finished, num_samples=2, start="import ", **likeliest).stdout == done.stdout


@pytest.mark.parametrize(
    "settings, told",
    [
        ({"start": ""}, "start = '': is empty; give at least one character"),
        ({"start": f"FILE:{os.devnull}"}, f"start = 'FILE:{os.devnull}': is empty; give at least one character"),
        ({"start": "FILE:none.txt"}, "start = 'FILE:none.txt': [Errno 2] No such file"),
        ({"top_p": 0}, "top_p = 0.0 (command line): must be above 0 and at most 1"),
        ({"temperature": -1}, "temperature = -1.0 (command line): must be at least 0"),
    ],
)
def test_what_cannot_be_sampled(finished, settings, told):
    done = sample(finished, **settings)
    assert done.returncode == 2 and told in done.stderr and "Traceback" not in done.stderr


def test_characters_that_the_tokenizer_lacks(make_data, tmp_path):
    folder = make_data([i % 60 for i in range(400)], vocab_size=64)
    train(tmp_path / "out", folder, max_iters=1)
    done = sample(tmp_path / "out", start="ABC éü")
    assert done.returncode == 2
    assert done.stderr.startswith(
        "error: start = 'ABC éü': characters 'éü' are not in the vocabulary; use only ' !\"#$"
    )


def test_sampling_without_a_run(tmp_path):
    lacking = f"out_dir = '{tmp_path}': no checkpoint in {tmp_path / 'checkpoints'}"
    assert message(sample(tmp_path)).startswith(f"{lacking}; set --out_dir to the folder of a run, or train one with")


@pytest.mark.parametrize("against", ["steps", "tokens", "seconds"])
def test_plots_of_one_and_of_several_runs(finished, tmp_path, data, against):
    for folders in ([finished], [finished, finished]):
        out = tmp_path / f"{len(folders)}.png"
        done = run("-m", "tools.plot", *map(str, folders), x=against, output=out)
        assert done.returncode == 0, done.stderr
        assert out.read_bytes().startswith(b"\x89PNG") and out.stat().st_size > 10_000
    assert len(rows(finished, "eval")) == 5


def test_other_numbers_are_plotted_on_request(finished, tmp_path):
    sizes = []
    for metrics in ("", "grad_norm,lr,tokens_per_second"):
        done = run("-m", "tools.plot", str(finished), str(finished), metrics=metrics, output=tmp_path / "x.png")
        assert done.returncode == 0, done.stderr
        sizes.append(int.from_bytes((tmp_path / "x.png").read_bytes()[20:24], "big"))  # height of a PNG
    assert sizes == [5 * 120, (5 + 3 * 2) * 120]
    text = message(run("-m", "tools.plot", str(finished), metrics="grad_nrm", output=tmp_path / "y.png"))
    assert text == "--metrics=grad_nrm: not logged; did you mean grad_norm?"
    assert not (tmp_path / "y.png").exists()


def test_several_runs_have_a_file_of_their_own(finished, tmp_path):
    """In the current folder, never loss.png of the first run."""
    for name in ("a", "b"):
        shutil.copytree(finished, tmp_path / name, ignore=shutil.ignore_patterns("checkpoints"))
    before = (tmp_path / "a" / "loss.png").read_bytes()
    line = command("-m", "tools.plot", "a", "b")
    done = subprocess.run(line, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True)
    assert done.returncode == 0 and done.stdout == b"loss_a_b.png\n", done.stderr
    assert (tmp_path / "a" / "loss.png").read_bytes() == before


def test_lines_are_named_in_the_order_of_their_ends():
    figure = figures.new_figure(8, 5)
    axes = figure.add_subplot()
    ends = {"b": 1.001, "d": 5.0, "a": 1.0, "c": 1.002}
    for number, (name, end) in enumerate(ends.items()):
        axes.plot([0, 1], [3, end], **figures.line_style(number), label=name)
    axes.plot([0, 1], [2, 2])  # without a label
    figures.label_ends(axes)
    figure.draw_without_rendering()
    texts = axes.get_legend().get_texts()
    assert [text.get_text() for text in texts] == ["d", "c", "b", "a"]
    assert [text.get_color() for text in texts] == [figures.COLORS[number] for number in (1, 3, 0, 2)]
    assert all(text.get_window_extent().x0 > axes.bbox.x1 for text in texts), "on top of the lines"


def test_a_folder_with_any_name_is_drawn(finished, tmp_path):
    """Dollar signs are no formula, and bytes that are no text no error."""
    folder = tmp_path / os.fsdecode(b"_$x^$ $\xff")
    shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("checkpoints"))
    figure = figures.new_figure(8, 5)
    figures.plot_losses(figure.add_subplot(), [folder])
    figure.savefig(tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 10_000


def test_the_axis_is_steps_tokens_or_seconds_of_training(tmp_path):
    """Of rows as a run writes them, with a kind that is not drawn and half a line of a run that was killed."""
    (tmp_path / "config.json").write_text('{"gradient_accumulation_steps": 2, "batch_size": 3, "block_size": 5}')
    steps = [("eval", 0, None), ("train", 0, None), ("train", 10, 100), ("other", 11, None), ("train", 20, 300)]
    losses = {"loss": 5.5, "val_loss": 5.5}
    lines = [json.dumps({"kind": kind, "step": step, "step_ms": ms, **losses}) for kind, step, ms in steps]
    (tmp_path / "metrics.jsonl").write_text("\n".join(['{"kind": "memory"}', *lines, '{"kind": "eval", "st']))
    for x, size in {"steps": 1, "tokens": 30, "seconds": 0.2}.items():
        assert step_size(*read_run(tmp_path), x) == size


def test_nothing_to_plot(tmp_path):
    done = run("-m", "tools.plot", str(tmp_path), output=tmp_path / "x.png")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and str(tmp_path) in done.stderr
