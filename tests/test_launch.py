"""launch.ranks: exit statuses, signals, no process left behind. Small scripts stand in for train.py."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from launch.ranks import free_port
from tests.running import run, start_process, train
from training import distributed

ROOT = Path(__file__).parent.parent
RANK = "import os, signal, sys, time\nrank = int(os.environ['RANK'])\n"
LATE = """
import os, sys, time
sys.path.insert(0, os.getcwd())
from training import distributed
from training.errors import UserError

def main():
    time.sleep(0 if distributed.rank() else 2.5)
    raise UserError("value, rule, fix")

distributed.run(main)
"""


@pytest.fixture
def launch(tmp_path):
    """launch(N, code, *arguments): a launcher whose ranks run the code and note their pids in tmp_path."""
    launchers = []

    def start(ranks: int, code: str, *arguments: str, options: Sequence[str] = ()) -> subprocess.Popen:
        script = tmp_path / "script.py"
        note = f"open({str(tmp_path)!r} + f'/pid-{{os.getpid()}}', 'w').close()\n"
        script.write_text(RANK + note + code)
        command = [sys.executable, "-m", "launch.ranks", *options, str(ranks), str(script), *arguments]
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


def test_ranks_get_the_variables_of_torchrun(launch):
    names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR"]
    launcher = launch(3, f"os.write(1, (' '.join(os.environ[n] for n in {names}) + chr(10)).encode())")
    output, errors = launcher.communicate(timeout=10)
    assert sorted(output.splitlines()) == [f"{rank} {rank} 3 3 127.0.0.1" for rank in range(3)]
    assert (errors, launcher.returncode) == ("", 0)


def test_a_single_rank_gets_the_variables_too(launch):
    output, _ = launch(1, "print(os.environ['RANK'], os.environ['WORLD_SIZE'])").communicate(timeout=10)
    assert output == "0 1\n"


@pytest.mark.parametrize("setting, ranks, threads", [(None, 2, max(1, len(os.sched_getaffinity(0)) // 2)), ("5", 2, 5)])
def test_cores_are_divided_unless_omp_num_threads_is_set(launch, monkeypatch, setting, ranks, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if setting:
        monkeypatch.setenv("OMP_NUM_THREADS", setting)
    output, _ = launch(ranks, "rank or print(os.environ['OMP_NUM_THREADS'])").communicate(timeout=10)
    assert int(output) == threads


def test_arguments_are_passed_unchanged(launch):
    arguments = ["--start=two words", "", "it's $HOME", "-h"]
    output, _ = launch(1, "print(sys.argv[1:])", *arguments).communicate(timeout=10)
    assert output.strip() == str(arguments)


def test_a_users_error_is_printed_once_and_keeps_its_status(launch):
    # Rank 1 is there first, and rank 0 must still get to print.
    launcher = launch(2, "rank or (time.sleep(0.5), print('error: value, rule, fix', file=sys.stderr))\nsys.exit(2)")
    _, errors = launcher.communicate(timeout=10)
    assert (errors, launcher.returncode) == ("error: value, rule, fix\n", 2)


@pytest.mark.parametrize(
    "end, status, message",
    [
        ("raise RuntimeError('broken')", 1, "RuntimeError: broken\nlaunch.ranks: rank 1 ended with status 1\n"),
        ("os._exit(7)", 7, "launch.ranks: rank 1 ended with status 7\n"),
        (
            "os.kill(os.getpid(), signal.SIGKILL)",
            137,
            "launch.ranks: rank 1 ended with signal 9 (SIGKILL): killed by hand, or out of memory (see dmesg)\n",
        ),
    ],
)
def test_a_rank_that_dies_ends_the_others(launch, tmp_path, end, status, message):
    start = time.monotonic()
    launcher = launch(3, f"if rank == 1:\n    time.sleep(0.3)\n    {end}\ntime.sleep(60)")
    _, errors = launcher.communicate(timeout=10)
    assert errors.endswith(message)
    assert launcher.returncode == status
    assert time.monotonic() - start < 5
    assert not any(map(alive, pids(tmp_path)))


def test_a_rank_that_ignores_sigterm_is_killed_after_the_grace(monkeypatch, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(RANK + "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nrank and sys.exit(3)\ntime.sleep(60)")
    code = f"from launch import ranks; ranks.GRACE_SECONDS = 0.5; exit(ranks.main(['2', {str(script)!r}]))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=10, capture_output=True, text=True)
    assert (done.stderr, done.returncode) == ("launch.ranks: rank 1 ended with status 3\n", 3)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_signals_reach_every_rank_and_a_clean_stop_is_not_an_error(launch, tmp_path, signum):
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


def test_a_module_is_started_with_m():
    command = [sys.executable, "-m", "launch.ranks", "1", "-m", "platform"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=10)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.strip()


def test_ranks_of_several_machines_are_numbered_by_node_rank(launch):
    options = ["--nnodes=2", "--node_rank=1", "--master_addr=host1", "--master_port=29500"]
    names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]
    launcher = launch(2, f"os.write(1, (' '.join(os.environ[n] for n in {names}) + chr(10)).encode())", options=options)
    output, _ = launcher.communicate(timeout=10)
    assert sorted(output.splitlines()) == ["2 0 4 2 host1 29500", "3 1 4 2 host1 29500"]


INVALID = {
    (): "no arguments: must be RANKS SCRIPT",
    ("2",): "2: must be RANKS SCRIPT",
    ("0", "train.py"): "0 train.py: must be RANKS SCRIPT",
    ("two", "train.py"): "two train.py: must be RANKS SCRIPT",
    ("2", "no_such.py"): "no_such.py: no such script",
    ("--nnodes=2", "2", "train.py"): "several machines need all of",
    (
        "--nnodes=2",
        "--node_rank=2",
        "--master_addr=a",
        "--master_port=1",
        "2",
        "train.py",
    ): "--node_rank from 0, below --nnodes",
    ("--nnodes=x", "2", "train.py"): "invalid int value",
}


@pytest.mark.parametrize("arguments", INVALID)
def test_invalid_arguments_are_one_message(arguments):
    command = [sys.executable, "-m", "launch.ranks", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=10)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("launch.ranks: ") and INVALID[arguments] in done.stderr


@pytest.mark.parametrize("nodes, ranks", [(1, 2), (2, 1)])
def test_a_port_in_use_is_one_message(tmp_path, data, nodes, ranks):
    """Rank 0's, which another process listens on."""
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        node = [f"--nnodes={nodes}", "--node_rank=0", "--master_addr=127.0.0.1", f"--master_port={port}"]
        script = [str(ranks), "train.py", f"--dataset={data}", f"--out_dir={tmp_path / 'out'}", "--device=cpu"]
        command = [sys.executable, "-m", "launch.ranks", *node, *script, "--gradient_accumulation_steps=2"]
        with start_process(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            _, errors = process.communicate(timeout=60)
    assert process.returncode == 2 and errors.count("\n") == 1, errors
    assert "another run uses the port; give the launcher another one with --master_port" in errors


VARIABLES = {
    "RANK=": "RANK = '' (environment): must be a whole number, 0 to 999999; python -m launch.ranks N SCRIPT sets it",
    "RANK=two WORLD_SIZE=4": "RANK = 'two' (environment): must be a whole number",
    "RANK=-1": "RANK = '-1' (environment): must be",
    "RANK=4 WORLD_SIZE=4": "RANK = 4 (environment): must be below WORLD_SIZE, 4; ",
    "WORLD_SIZE=": "WORLD_SIZE = '' (environment): must be a whole number, 1 to",
    "WORLD_SIZE=0": "WORLD_SIZE = '0' (environment): must be",
    "WORLD_SIZE=-2": "WORLD_SIZE = '-2' (environment): must be",
    "WORLD_SIZE=0 RANK=1": "WORLD_SIZE = '0' (environment): must be",  # started by hand: rank 0 may have other ones
    "WORLD_SIZE=2 RANK=1 MASTER_PORT=29500": "MASTER_ADDR = '' (environment): must be the host of rank 0; ",
    "WORLD_SIZE=2 RANK=1 MASTER_ADDR=host1": "MASTER_PORT = '' (environment): must be a whole number",
    "WORLD_SIZE=2 RANK=1 MASTER_ADDR=host1 MASTER_PORT=1 LOCAL_RANK=x": "LOCAL_RANK = 'x' (environment): must be",
    "LOCAL_RANK=x": "LOCAL_RANK = 'x' (environment): must be",
    "LOCAL_WORLD_SIZE=": "LOCAL_WORLD_SIZE = '' (environment): must be",
    "LOCAL_SIZE=0": "LOCAL_SIZE = '0' (environment): must be",
    "WORLD_SIZE=2": "MASTER_ADDR = '' (environment): must be the host of rank 0; ",
    "WORLD_SIZE=2 MASTER_ADDR=host1": "MASTER_PORT = '' (environment): must be a whole number, 1 to 65535; ",
    "WORLD_SIZE=2 MASTER_ADDR=host1 MASTER_PORT=http": "MASTER_PORT = 'http' (environment): must be",
    "WORLD_SIZE=2 MASTER_ADDR=host1 MASTER_PORT=65536": "MASTER_PORT = '65536' (environment): must be",
}


@pytest.mark.parametrize("text", VARIABLES)
def test_wrong_variables_of_a_launcher_are_one_message(monkeypatch, capsys, text):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for word in text.split():
        monkeypatch.setenv(*word.split("="))
    with pytest.raises(SystemExit) as end:
        distributed.run(lambda: pytest.fail("the script ran"))
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith(f"error: {VARIABLES[text]}") and error.count("\n") == 1


def test_a_single_process_needs_no_address_whatever_local_world_size_is(tmp_path, data):
    """A process group of one, in a shell that a launcher of several ranks has left variables in."""
    train(tmp_path, data, env={"LOCAL_WORLD_SIZE": "2"}, strategy="fsdp", max_iters=1)


def test_rank_0_can_report_an_error_that_another_rank_finds_first(tmp_path):
    """Under launchers that kill all ranks as soon as one has ended."""
    (tmp_path / "script.py").write_text(LATE)
    launchers = [["torch.distributed.run", "--standalone", "--nproc_per_node=2"]]
    launchers += [["deepspeed.launcher.runner", "--num_gpus=2", f"--master_port={free_port()}"]]
    for launcher in launchers:
        done = run("-m", *launcher, str(tmp_path / "script.py"))
        assert done.returncode and done.stderr.count("error: value, rule, fix\n") == 1, done.stderr
