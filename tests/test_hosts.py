"""Several hosts: the losses of one process, and a run that ends everywhere when one host fails. Real sshd and links."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests import cluster
from tests.cluster import Cluster
from tests.running import ROOT, TINY, command, difference, losses, wait_for_step, zero_json
from training.checkpoint import Checkpoints
from training.errors import HUNG, LOST, STOPPED

SETTINGS: dict[str, Any] = {
    "gradient_accumulation_steps": 12,
    "max_iters": 12,
    "lr_decay_iters": 12,
    "eval_interval": 5,
}
STRATEGIES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "hsdp": {"strategy": "fsdp", "shard_ranks": 2},
    "zero2": {"deepspeed_config": zero_json("zero2")},
    "zero3": {"deepspeed_config": zero_json("zero3")},
    # matrices are shared inside a host, stages and batches across hosts
    "pp2 x tp2": {"deepspeed_config": zero_json("zero1"), "tensor_parallel": 2, "pipeline_parallel": 2},
    "tp2 x dp2": {"deepspeed_config": zero_json("zero1"), "tensor_parallel": 2},
}


LISTENING = """
import os, sys
sys.path.insert(0, os.getcwd())
from training import distributed

def main():
    with distributed.start("cpu", "auto") as ranks:
        ranks.share(0.0)
        sockets = [os.path.realpath(file.path).rpartition("/")[2] for file in os.scandir("/proc/self/fd")]
        rows = [row.split() for name in ("tcp", "tcp6") for row in open(f"/proc/self/net/{name}")]
        own = [row for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in sockets]  # 0A: LISTEN
        os.write(1, (" ".join(row[1].split(":")[0] for row in own) + os.linesep).encode())

distributed.run(main)
"""


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    cluster.require()
    with Cluster(tmp_path_factory.mktemp("cluster"), 4) as made:
        yield made


@pytest.fixture(scope="module")
def single(reference) -> Path:
    """A run of one process."""
    return reference(**SETTINGS)


def launch(made: Cluster, folder: Path, data: Path, *options: str, slots: int = 2, hosts: int = 2, **settings):
    """Start launch.hosts; stderr goes to stdout."""
    given = {**TINY, **SETTINGS, "dataset": data, "out_dir": folder, **settings}
    script = "train_deepspeed.py" if "deepspeed_config" in settings else "train.py"
    hostfile = made.hostfile(slots, hosts=made.hosts[:hosts])
    head = [sys.executable, "-m", "launch.hosts", f"--hostfile={hostfile}", f"--ssh={made.ssh}"]
    line = [*head, *options, *command(script, **given)[1:]]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(line, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.parametrize(
    "strategy, slots, expected",
    [
        ("pp2 x tp2", 2, "4 ranks = 2 pipeline x 2 tensor; 1,536 tokens per step = 1 data-parallel rank x 12"),
        ("tp2 x dp2", 2, "4 ranks = 2 data x 2 tensor; 1,536 tokens per step = 2 data-parallel ranks x 6"),
    ],
)  # fmt: skip
def test_two_hosts_train_as_one_process(hosts, tmp_path, data, single, strategy, slots, expected):
    process = launch(hosts, tmp_path, data, slots=slots, **STRATEGIES[strategy])
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and expected in output, output
    assert difference(single, tmp_path) <= 1e-5 and difference(single, tmp_path, "grad_norm") <= 1e-5
    assert Checkpoints(str(tmp_path)).newest()[1]["world_size"] == 2 * slots
    assert not hosts.left()


def test_four_hosts_with_one_rank_each(hosts, tmp_path, data, single):
    """HSDP: two hosts share one copy of the model state, the other two the other one."""
    process = launch(hosts, tmp_path, data, slots=1, hosts=4, **STRATEGIES["hsdp"])
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "4 ranks x 3 micro-steps" in output, output
    assert difference(single, tmp_path) <= 1e-5 and difference(single, tmp_path, "grad_norm") <= 1e-5


def test_a_launch_script_takes_a_hostfile_from_the_environment(hosts, tmp_path, data, single):
    given = {**TINY, **SETTINGS, "dataset": data, "out_dir": tmp_path, "log_interval": 1}
    arguments = [f"--{name}={value}" for name, value in given.items()]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HOSTFILE": str(hosts.hostfile(1, hosts=hosts.hosts[::2]))}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    line = ["./launch_deepspeed_zero2.sh", f"--ssh={hosts.ssh}", *arguments]
    done = subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert difference(single, tmp_path) <= 1e-5


@pytest.mark.needs("pdsh")
def test_deepspeeds_own_launcher_takes_a_hostfile(hosts, tmp_path, data, single):
    """With pdsh; the environment is forwarded by a .deepspeed_env, as docs/multi_node.md says."""
    given = {**TINY, **SETTINGS, "dataset": data, "out_dir": tmp_path, **STRATEGIES["zero3"]}
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PDSH_RCMD_TYPE": "ssh"}
    env["DS_ENV_FILE"] = str(tmp_path / ".deepspeed_env")
    env["PATH"] = f"{hosts.folder / 'bin'}:{Path(sys.executable).parent}:{env['PATH']}"
    write = re.search(r"`(env \| .* \.deepspeed_env)`", (ROOT / "docs/multi_node.md").read_text())
    assert write and subprocess.run(write[1], shell=True, cwd=tmp_path, env=env).returncode == 0
    line = ["deepspeed", f"--hostfile={hosts.hostfile(2)}", "--include=host1@host2"]
    line += [f"--master_addr={hosts.hosts[0].address}", *command("train_deepspeed.py", **given)[1:]]
    done = subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert difference(single, tmp_path) <= 1e-5 and difference(single, tmp_path, "grad_norm") <= 1e-5


@pytest.mark.needs("mpiexec")
def test_mpis_launcher_starts_a_launcher_on_every_node(hosts, tmp_path, data, single):
    given = {**TINY, **SETTINGS, "dataset": data, "out_dir": tmp_path}
    line = ["mpiexec", "-launcher", "ssh", "-launcher-exec", hosts.folder / "bin" / "ssh", "-ppn", "1", "-n", "2"]
    line += ["-hosts", "host1,host2", "-localhost", hosts.subnet.format(254), "docs/mpi.sh", "host1", "1"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    line += command("train.py", **given)[1:]
    done = subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert difference(single, tmp_path) <= 1e-5 and not hosts.left()


FAILURES = {
    "a rank is killed": (128 + signal.SIGKILL, "launch.ranks: rank [123] ended with signal 9"),
    "all of a host is killed": (128 + signal.SIGKILL, "host2: (ended with status|the connection was lost)"),
    "a link goes down": (HUNG, "host2: the connection was lost|suspect the network|no sign of life"),
    "a process is stopped": (HUNG, "no sign of life from ranks? [123]"),
}
# With ZeRO-2 one rank per host, because each takes seconds to import DeepSpeed.
FAILING = [("pp2 x tp2", 2, "a rank is killed"), ("ddp", 2, "a process is stopped")]
FAILING += [("zero2", 1, "all of a host is killed"), ("zero2", 1, "a link goes down")]


@pytest.mark.parametrize("strategy, slots, what", FAILING)
def test_a_failure_on_one_host_ends_the_run_on_all(trio, tmp_path, data, strategy, slots, what):
    status, message = FAILURES[what]
    folder, host = tmp_path / "out", trio.hosts[1]
    settings = {"max_iters": 100_000, "eval_interval": 100_000, "hang_minutes": 0.1, **STRATEGIES[strategy]}
    process = launch(trio, folder, data, slots=slots, **settings)
    wait_for_step(folder, process, 4)
    broken = time.monotonic()
    if what == "a link goes down":
        host.unplug()
    elif what == "all of a host is killed":
        host.kill(signal.SIGKILL)
    else:
        (pid, *_) = [p for p in host.pids() if f"RANK={slots}\0" in Path(f"/proc/{p}/environ").read_text()]
        os.kill(pid, signal.SIGKILL if what == "a rank is killed" else signal.SIGSTOP)
    output, _ = process.communicate(timeout=90)
    seconds = time.monotonic() - broken
    while trio.left() and time.monotonic() - broken < 60:
        time.sleep(0.5)
    print(
        f"{what}, {strategy}: ended after {seconds:.0f} s, all processes gone after {time.monotonic() - broken:.0f} s"
    )
    assert not trio.left() and seconds < 60, output
    assert re.search(message, output) and "Traceback" not in output, output
    assert process.returncode in (status, LOST), output


def test_dropped_packets_change_no_loss(trio, tmp_path, data, reference):
    longer = {"max_iters": 30, "lr_decay_iters": 30}
    for host in trio.hosts[:2]:
        host.drop(5)
    process = launch(trio, tmp_path / "out", data, slots=1, **longer)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert all(host.dropped() > 10 for host in trio.hosts[:2]), "no packet was dropped"
    assert difference(reference(**{**SETTINGS, **longer}), tmp_path / "out") <= 1e-5


def test_a_lost_host_is_left_out_of_the_restart(trio, tmp_path, data, single):
    """3 hosts, then 2: the same global batch and losses; 3 partitions are resharded to 2."""
    settings = {"resume": "auto", "hang_minutes": 0.1, **STRATEGIES["zero2"]}
    process = launch(trio, tmp_path / "out", data, "--restarts=2", slots=1, hosts=3, **settings)
    wait_for_step(tmp_path / "out", process, 6)
    trio.hosts[2].unplug()
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    assert "launch.hosts: restart 1 of 2, on host1, host2" in output
    assert Checkpoints(str(tmp_path / "out")).newest()[1]["world_size"] == 2
    assert len(losses(tmp_path / "out")) == 12 and difference(single, tmp_path / "out") <= 1e-5


def test_ranks_of_one_host_accept_connections_from_it_only(hosts, tmp_path):
    """Each rank prints the addresses on which it listens. The host's name belongs to its network, not to loopback."""
    (tmp_path / "script.py").write_text(LISTENING)
    hostfile = hosts.hostfile(2, hosts=hosts.hosts[:1])
    line = [sys.executable, "-m", "launch.hosts", f"--hostfile={hostfile}", f"--ssh={hosts.ssh}"]
    line.append(str(tmp_path / "script.py"))
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2 and all(done.stdout.splitlines()), done.stdout
    assert set(done.stdout.split()) == {"0100007F"}, "127.0.0.1 in hexadecimal"


def test_a_signal_stops_all_hosts_and_saves(hosts, tmp_path, data):
    process = launch(hosts, tmp_path, data, slots=1, max_iters=100_000, eval_interval=100_000)
    wait_for_step(tmp_path, process, 4)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == STOPPED and "stopped by SIGUSR1: saved at step" in output, output
    assert not hosts.left()
