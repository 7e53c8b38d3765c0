"""tests/fork_server.py: a forked process is the same as a new one, for scripts, modules and ranks."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.running import ROOT, TINY, command, losses, run, start_process, started_with, zero_json

STATE = """
import json, os, signal, sys
import helper
handlers = {number.name: str(signal.getsignal(number)) for number in signal.Signals if number != signal.SIGCHLD}
state = {"argv": sys.argv, "original": sys.orig_argv, "path": sys.path, "cwd": os.getcwd(), "helper": helper.__file__}
state |= {"name": __name__, "file": __file__, "main": vars(sys.modules["__main__"]) is globals(), "handlers": handlers}
state |= {"environment": {name: value for name, value in os.environ.items() if name not in IGNORED}}
state |= {"blocked": sorted(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, []))), "tty": sys.stdout.isatty()}
state |= {"stdin": sys.stdin.read(), "descriptors": sorted(map(int, os.listdir("/proc/self/fd")))}
state |= {"own session": os.getsid(0) == os.getpid()} if "RANK" in os.environ else {}
state |= {"deepspeed": "deepspeed" in sys.modules, "helpers": sorted(n for n in sys.modules if n.startswith("launch"))}
print(json.dumps(state, indent=1))
print("to stderr", file=sys.stderr)
"""
IGNORED = ("MASTER_PORT", "PYTEST_CURRENT_TEST", "LC_CTYPE", "TORCHINDUCTOR_CACHE_DIR", "PYTORCH_NVML_BASED_CUDA_CHECK")
ENDS = {
    "the end": "print('done', end='')",
    "status": "import sys; print('no newline', end=''); sys.exit(3)",
    "text": "import sys; sys.exit('words')",
    "at once": "import os; print('printed', flush=True); os._exit(75)",
    "exception": "def function():\n    raise ValueError('wrong')\n\nfunction()",
    "cause": "try:\n    1 / 0\nexcept ZeroDivisionError as error:\n    raise RuntimeError from error",
    "syntax": "a = = 1",
    "no module": "import no_such_module",
    "killed": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "terminated": "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
    "interrupted": "raise KeyboardInterrupt",
    "at exit": "import atexit; atexit.register(print, 'goodbye')",
    "a thread": "import threading, time\nthreading.Thread(target=lambda: (time.sleep(0.1), print('late'))).start()",
    "a forgotten buffer": "file = open('left.txt', 'w')\nfile.write('flushed')",
}
RANK_1 = "import os, signal, time\nif os.environ['RANK'] == '1':\n    {}\ntime.sleep(60)"
RANKS_END = {"the end": ENDS["the end"], "stopped": "import os; os._exit(75)"}
RANKS_END |= {"failing rank": RANK_1.format("raise SystemExit(4)")}
RANKS_END |= {"killed rank": RANK_1.format("os.kill(os.getpid(), signal.SIGKILL)")}


def both(*line: str, cwd: Path, **variables: str) -> list[tuple[int, str, str]]:
    """Status, output and errors of a command, executed and forked."""
    ends = []
    for fresh in (True, False):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", **variables}
        pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with start_process([sys.executable, *line], fresh, cwd=cwd, env=environment, text=True, **pipes) as process:
            output, errors = process.communicate(timeout=60)
        ends.append((process.returncode, output, errors))
    return ends


def assert_same_state(new: tuple[int, str, str], forked: tuple[int, str, str], variable: str) -> None:
    assert new[0] == forked[0] == 0, new[2]
    expected, found = (json.loads(output) for _, output, _ in (new, forked))
    for name, value in expected.items():
        assert found[name] == value, name
    assert variable in expected["environment"] and forked == new


@pytest.mark.parametrize("line", [["script.py", "a", "--b=c d"], ["-u", "folder/../script.py"], ["-m", "script", "a"]])
def test_a_script_finds_the_same_state(tmp_path, line):
    (tmp_path / "folder").mkdir()
    (tmp_path / "helper.py").touch()
    (tmp_path / "script.py").write_text(f"IGNORED = {IGNORED}\n{STATE}")
    new, forked = both(*line, cwd=tmp_path, MARK="marked")
    assert_same_state(new, forked, "MARK")


@pytest.mark.parametrize("end", ENDS)
def test_a_script_ends_the_same(tmp_path, end):
    (tmp_path / "script.py").write_text(ENDS[end])
    new, forked = both("script.py", cwd=tmp_path)
    assert forked == new
    assert end != "a forgotten buffer" or (tmp_path / "left.txt").read_text() == "flushed"


def test_ranks_find_the_same_state(tmp_path):
    (tmp_path / "helper.py").touch()
    (tmp_path / "script.py").write_text(f"IGNORED = {IGNORED}\n{STATE}")
    new, forked = both(*command(f"{tmp_path}/script.py", "a", ranks=1)[1:], cwd=ROOT)
    assert_same_state(new, forked, "RANK")


@pytest.mark.parametrize("end", RANKS_END)
def test_ranks_end_the_same(tmp_path, end):
    (tmp_path / "script.py").write_text(RANKS_END[end])
    new, forked = both(*command(f"{tmp_path}/script.py", ranks=2)[1:], cwd=ROOT)
    assert forked == new


def test_forked_ranks_are_forked_and_seen_by_their_environment(tmp_path):
    """The launcher and both ranks have the server's command line; nobody is left where the launcher is killed."""
    (tmp_path / "script.py").write_text("import time; print('here'); time.sleep(60)")
    mark = f"MARK={tmp_path}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MARK": str(tmp_path)}
    line = command(f"{tmp_path}/script.py", ranks=2)
    with start_process(line, cwd=ROOT, env=environment, stdout=subprocess.PIPE) as process:
        assert process.stdout and [process.stdout.readline() for _ in range(2)] == [b"here\n"] * 2
        marked = started_with(mark)
        assert len(marked) == 3 and str(process.pid) in marked
        assert all(b"fork_server.py" in Path(f"/proc/{pid}/cmdline").read_bytes() for pid in marked)
        process.kill()
        assert process.wait(10) == -9
    deadline = time.monotonic() + 10  # the kernel kills the ranks after the launcher's end, and that takes a moment
    while started_with(mark) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not started_with(mark)


def test_variables_that_imports_read_need_a_new_process(tmp_path):
    (tmp_path / "script.py").write_text("print(open('/proc/self/cmdline').read())")
    for variables, is_forked in (({"WANDB_MODE": "offline"}, True), ({"CXX": "none"}, False), ({"PATH": ""}, False)):
        _, forked = both("script.py", cwd=tmp_path, **variables)
        assert ("fork_server" in forked[1]) == is_forked, variables


@pytest.mark.parametrize("strategy, ranks", [("auto", 2), ("fsdp", 0), ("zero2", 0), ("zero3", 2)])
def test_a_run_trains_to_the_same_bits(tmp_path, data, strategy, ranks):
    is_zero = strategy.startswith("zero")
    own = {"deepspeed_config": zero_json(strategy)} if is_zero else {"strategy": strategy}
    own |= {"dropout": 0.1, "gradient_accumulation_steps": 2, "max_iters": 5}
    curves = []
    for name in ("new", "forked"):
        settings = {**TINY, **own, "dataset": data, "out_dir": tmp_path / name}
        script = "train_deepspeed.py" if is_zero else "train.py"
        done = run(script, ranks=ranks, fresh=name == "new", **settings)
        assert done.returncode == 0 and not done.stderr, done.stderr
        curves.append([losses(tmp_path / name), losses(tmp_path / name, "grad_norm")])
    assert curves[0] == curves[1] and len(curves[0][0]) == 5
