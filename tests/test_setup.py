"""The launch scripts: ranks, recipes, help, and what the quickstart does in which order."""

import os
import signal
import subprocess
import time

import pytest

from tests.clone import SCRIPTS


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse_and_are_executable(script):
    subprocess.run(["bash", "-n", script], check=True)
    assert os.access(script, os.X_OK)


@pytest.mark.parametrize("script", [s.name for s in SCRIPTS if s.suffix == ".sh"])
def test_help_is_the_head_of_the_script(clone, script):
    status, output, errors = clone.run(f"./{script}", "--help")
    assert (status, errors) == (0, "")
    assert output.startswith(f"./{script} ") and "shellcheck" not in output and "environment" not in output


def test_an_active_python_with_the_packages_is_used_as_it_is(clone):
    start = time.monotonic()
    status, output, _ = clone.ddp("1")
    assert (status, output) == (0, "0 1 --strategy=ddp config/train_gpt2.py\n")
    assert time.monotonic() - start < 3
    assert not (clone.folder / ".venv").exists()


@pytest.mark.parametrize(
    "arguments, passed_on",
    [
        ([], "config/train_gpt2.py"),
        (["--start=a b", "--data_dir=x.py"], "config/train_gpt2.py --start=a b --data_dir=x.py"),
        (["config/mine.py", "--max_iters=3"], "config/mine.py --max_iters=3"),
        (["--max_iters=3", "config/mine.py"], "--max_iters=3 config/mine.py"),
    ],
)
def test_the_default_config_is_used_when_none_is_named(clone, arguments, passed_on):
    assert clone.ddp("1", *arguments)[1] == f"0 1 --strategy=ddp {passed_on}\n"


@pytest.mark.parametrize(
    "gpus, visible, arguments, ranks",
    [
        (3, None, [], 3),
        (3, None, ["2"], 2),
        (3, "0,2", [], 2),
        (3, "GPU-1", [], 1),
        (3, "0,1,2,3", [], 3),
        (3, "", [], 2),
        (3, None, ["4", "--device=cpu"], 4),
        (0, None, [], 2),
        (0, None, ["3"], 3),
    ],
)
def test_one_rank_per_gpu_or_two_cpu_ranks(clone, gpus, visible, arguments, ranks):
    if gpus:
        clone.gpus(gpus)
    if visible is not None:
        clone.env["CUDA_VISIBLE_DEVICES"] = visible
    status, output, _ = clone.ddp(*arguments)
    assert status == 0
    assert sorted(line.split()[:2] for line in output.splitlines()) == [[str(r), str(ranks)] for r in range(ranks)]


@pytest.mark.parametrize(
    "count, message",
    [
        ("0", "0 ranks: must be a whole number, at least 1"),
        ("-1", "-1 ranks: must be a whole number, at least 1"),
        ("1.5", "1.5 ranks: must be a whole number, at least 1"),
        ("config/mine", "config/mine ranks: must be a whole number, at least 1"),
    ],
)
def test_an_invalid_number_of_ranks_is_one_message(clone, count, message):
    clone.gpus(2)
    status, output, errors = clone.ddp(count)
    assert (status, output) == (2, "")
    assert errors.startswith(f"launch_traditional_ddp.sh: {message}") and errors.count("\n") == 1


@pytest.fixture
def quickstart(clone):
    clone.write("data/python_docs/prepare.py", "open('data/python_docs/meta.json', 'w'); print('prepared')")
    clone.write("sample.py", "import sys; print('sampled', *sys.argv[1:])")
    return clone


def test_quickstart_prepares_once_trains_and_samples(quickstart):
    status, output, _ = quickstart.run("./launch_quickstart.sh", "1")
    assert status == 0
    prepared, trained, _, sampled, *_ = output.splitlines()
    assert (prepared, trained) == ("prepared", "0 1 config/train_quickstart.py")
    assert sampled.startswith("sampled --out_dir=out-quickstart ")

    status, output, _ = quickstart.run("./launch_quickstart.sh", "1", "--out_dir=out my run")
    assert "prepared" not in output
    assert "sampled --out_dir=out my run " in output


def test_quickstart_ends_when_training_fails(quickstart):
    quickstart.write("train_deepspeed.py", "import sys; sys.exit('error: no')")
    status, output, errors = quickstart.run("./launch_quickstart.sh", "1")
    assert status == 1
    assert "error: no" in errors and "sampled" not in output


@pytest.mark.parametrize("handler", ["signal.SIG_DFL", "lambda *_: sys.exit(0)"])
def test_quickstart_passes_sigterm_on_and_does_not_sample(quickstart, handler):
    quickstart.write(
        "train_deepspeed.py",
        "import os, signal, sys, time\n"
        f"signal.signal(signal.SIGTERM, {handler})\n"
        "print(os.getpid(), flush=True)\ntime.sleep(60)",
    )
    quickstart.write("data/python_docs/meta.json", "{}")
    with subprocess.Popen(
        ["./launch_quickstart.sh", "1"], cwd=quickstart.folder, env=quickstart.env, stdout=subprocess.PIPE, text=True
    ) as script:
        assert script.stdout
        pid = int(script.stdout.readline())
        script.send_signal(signal.SIGTERM)
        rest, _ = script.communicate(timeout=10)
    assert (rest, script.returncode) == ("", 128 + signal.SIGTERM)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
