"""sample.py and plot.py on a real run."""

import json
import os

import pytest

from tests.running import rows, run, train
from training.figures import positions, read_run


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
        ({"start": "FILE:none.txt"}, "start = 'FILE:none.txt': cannot read none.txt"),
        ({"top_p": 0}, "top_p = 0.0 (command line): must be above 0 and at most 1"),
        ({"temperature": -1}, "temperature = -1.0 (command line): must not be negative"),
        ({"dtype": "float16"}, "dtype = 'float16': a CPU lacks it"),
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
    assert done.stderr.startswith("error: start = 'ABC éü': the tokenizer lacks 'éü'; it knows only ' !\"#$")


def test_sampling_an_empty_folder(tmp_path):
    done = run("sample.py", out_dir=tmp_path)
    assert done.returncode == 2 and f"{tmp_path} holds no checkpoint" in done.stderr


@pytest.mark.parametrize("against", ["steps", "tokens", "seconds"])
def test_plots_of_one_and_of_several_runs(finished, tmp_path, data, against):
    for folders in ([finished], [finished, finished]):
        out = tmp_path / f"{len(folders)}.png"
        done = run("plot.py", *map(str, folders), x=against, output=out)
        assert done.returncode == 0, done.stderr
        assert out.read_bytes().startswith(b"\x89PNG") and out.stat().st_size > 10_000
    assert len(rows(finished, "eval")) == 5


def test_the_axis_is_steps_tokens_or_seconds_of_training(tmp_path):
    """Of rows as a run writes them, with a kind that is not drawn and half a line of a run that was killed."""
    (tmp_path / "config.json").write_text('{"gradient_accumulation_steps": 2, "batch_size": 3, "block_size": 5}')
    steps = [("eval", 0, None), ("train", 0, None), ("train", 10, 100), ("other", 11, None), ("train", 20, 300)]
    lines = [json.dumps({"kind": kind, "step": step, "step_ms": ms}) for kind, step, ms in steps]
    (tmp_path / "metrics.jsonl").write_text("\n".join(['{"kind": "memory"}', *lines, '{"kind": "eval", "st']))
    expected = {"steps": [0, 10, 20], "tokens": [0, 300, 600], "seconds": [0, 1, 4]}
    for x, places in expected.items():
        assert positions(*read_run(tmp_path), x) == dict(zip([0, 10, 20], places, strict=True))


def test_nothing_to_plot(tmp_path):
    done = run("plot.py", str(tmp_path), output=tmp_path / "x.png")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and str(tmp_path) in done.stderr
