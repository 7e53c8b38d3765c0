"""launch.py: exit statuses, signals, nothing left behind. Small scripts stand in for train.py."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RANK = "import os, signal, sys, time\nrank = int(os.environ['RANK'])\n"


@pytest.fixture
def launch(tmp_path):
    """launch(N, code, *arguments): a launcher whose ranks run the code and note their pids in tmp_path."""
    launchers = []

    def start(ranks: int, code: str, *arguments: str) -> subprocess.Popen:
        script = tmp_path / "script.py"
        note = f"open({str(tmp_path)!r} + f'/pid-{{os.getpid()}}', 'w').close()\n"
        script.write_text(RANK + note + code)
        command = [sys.executable, "launch.py", str(ranks), str(script), *arguments]
        pipe = subprocess.PIPE
        launchers.append(subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True))
        return launchers[-1]

    yield start
    for launcher in launchers:
        launcher.kill()
        launcher.wait()


def wait_for(condition, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def pids(folder: Path) -> list[int]:
    return [int(file.name.removeprefix("pid-")) for file in folder.glob("pid-*")]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_ranks_get_what_torchrun_gives_them(launch):
    names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR"]
    launcher = launch(3, f"os.write(1, (' '.join(os.environ[n] for n in {names}) + chr(10)).encode())")
    output, errors = launcher.communicate(timeout=10)
    assert sorted(output.splitlines()) == [f"{rank} {rank} 3 3 127.0.0.1" for rank in range(3)]
    assert (errors, launcher.returncode) == ("", 0)


def test_one_rank_gets_the_variables_too(launch):
    output, _ = launch(1, "print(os.environ['RANK'], os.environ['WORLD_SIZE'])").communicate(timeout=10)
    assert output == "0 1\n"


@pytest.mark.parametrize("given, ranks, threads", [(None, 2, max(1, len(os.sched_getaffinity(0)) // 2)), ("5", 2, 5)])
def test_the_cores_are_shared_out_unless_the_user_has_said_otherwise(launch, monkeypatch, given, ranks, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    output, _ = launch(ranks, "rank or print(os.environ['OMP_NUM_THREADS'])").communicate(timeout=10)
    assert int(output) == threads


def test_arguments_pass_through_unharmed(launch):
    arguments = ["--start=two words", "", "it's $HOME", "-h"]
    output, _ = launch(1, "print(sys.argv[1:])", *arguments).communicate(timeout=10)
    assert output.strip() == str(arguments)


def test_a_users_error_is_told_once_and_keeps_its_status(launch):
    # Rank 1 is there first, and rank 0 must still get to print.
    launcher = launch(2, "rank or (time.sleep(0.5), print('error: value, rule, fix', file=sys.stderr))\nsys.exit(2)")
    _, errors = launcher.communicate(timeout=10)
    assert (errors, launcher.returncode) == ("error: value, rule, fix\n", 2)


@pytest.mark.parametrize(
    "end, status, words",
    [
        ("raise RuntimeError('broken')", 1, "RuntimeError: broken\nlaunch.py: rank 1 ended with status 1\n"),
        ("os._exit(7)", 7, "launch.py: rank 1 ended with status 7\n"),
        (
            "os.kill(os.getpid(), signal.SIGKILL)",
            137,
            "launch.py: rank 1 ended with signal 9 (SIGKILL): killed by hand, or for memory (see dmesg)\n",
        ),
    ],
)
def test_a_rank_that_dies_ends_the_others(launch, tmp_path, end, status, words):
    start = time.monotonic()
    launcher = launch(3, f"if rank == 1:\n    time.sleep(0.3)\n    {end}\ntime.sleep(60)")
    _, errors = launcher.communicate(timeout=10)
    assert errors.endswith(words)
    assert launcher.returncode == status
    assert time.monotonic() - start < 5
    assert not any(map(alive, pids(tmp_path)))


def test_a_rank_that_ignores_sigterm_is_killed_after_the_grace(monkeypatch, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(RANK + "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nrank and sys.exit(3)\ntime.sleep(60)")
    code = f"import sys, launch; launch.GRACE = 0.5; sys.exit(launch.main(['2', {str(script)!r}]))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=10, capture_output=True, text=True)
    assert (done.stderr, done.returncode) == ("launch.py: rank 1 ended with status 3\n", 3)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_signals_reach_every_rank_and_a_clean_stop_is_no_error(launch, tmp_path, signum):
    launcher = launch(
        2,
        f"signal.signal({int(signum)}, lambda *_: (os.write(1, b'saved '), sys.exit(0)))\n"
        f"signal.pthread_sigmask(signal.SIG_UNBLOCK, [{int(signum)}])\n"
        "os.write(1, b'ready\\n')\ntime.sleep(60)",
    )
    assert [launcher.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
    launcher.send_signal(signum)
    output, errors = launcher.communicate(timeout=10)
    assert (output, errors, launcher.returncode) == ("saved saved ", "", 0)
    assert not any(map(alive, pids(tmp_path)))


def test_ranks_and_their_children_without_a_handler_end_on_sigterm(launch, tmp_path):
    child = f"import os, time; open({str(tmp_path)!r} + f'/pid-{{os.getpid()}}', 'w'); time.sleep(60)"
    launcher = launch(2, f"import subprocess\nsubprocess.Popen([sys.executable, '-c', {child!r}])\ntime.sleep(60)")
    wait_for(lambda: len(pids(tmp_path)) == 4)
    launcher.terminate()
    _, errors = launcher.communicate(timeout=10)
    assert (errors, launcher.returncode) == ("", 128 + signal.SIGTERM)
    wait_for(lambda: not any(map(alive, pids(tmp_path))))


def test_a_second_signal_ends_a_rank_that_takes_too_long(launch):
    launcher = launch(1, "signal.signal(15, lambda *_: time.sleep(60))\nprint('ready')\ntime.sleep(60)")
    launcher.stdout.readline()
    launcher.terminate()
    time.sleep(1.2)
    launcher.terminate()
    launcher.communicate(timeout=5)
    assert launcher.returncode == 128 + signal.SIGKILL


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends children with their parent")
def test_a_killed_launcher_leaves_no_rank_behind(launch, tmp_path):
    launcher = launch(2, "time.sleep(60)")
    wait_for(lambda: len(pids(tmp_path)) == 2)
    launcher.kill()
    wait_for(lambda: not any(map(alive, pids(tmp_path))))


def test_two_launches_at_once_have_their_own_ports(launch):
    code = (
        "import torch, torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "total = torch.ones(1)\n"
        "dist.all_reduce(total)\n"
        "rank or print(int(total), os.environ['MASTER_PORT'])\n"
        "dist.barrier()\n"
        "dist.destroy_process_group()\n"
    )
    launchers = [launch(2, code) for _ in range(2)]
    results = [launcher.communicate(timeout=60) for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0, 0], results
    (total, port), (other_total, other_port) = [output.split() for output, _ in results]
    assert total == other_total == "2"
    assert port != other_port


@pytest.mark.parametrize("arguments", [[], ["2"], ["0", "train.py"], ["two", "train.py"], ["2", "no_such.py"]])
def test_what_cannot_be_started_is_one_message(arguments):
    command = [sys.executable, "launch.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=10)
    assert done.returncode == 2
    assert done.stderr.startswith("launch.py: ") and done.stderr.count("\n") == 1
