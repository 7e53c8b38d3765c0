"""Hosts that cannot be used are listed before anything starts, each with the fix."""

import json
import os
import re
import socket
import subprocess
import sys
from typing import Any

import pytest

from launch import hosts, machine
from tests import cluster
from tests.cluster import Cluster
from tests.running import ROOT, TINY, message
from training.errors import LOST, UserError

HOSTFILES = {
    "": "is empty; write one line per host: NAME slots=RANKS",
    "host1 slots=2\nhost2\n": ":2: 'host2': must be NAME slots=RANKS, RANKS 1 to 99999",
    "host1 slots=0": ":1: 'host1 slots=0': must be NAME slots=RANKS",
    "# mine\n\nhost1 slots=2\nhost1 slots=2": ":4: 'host1 slots=2': must be NAME slots=RANKS, RANKS 1 to 99999",
    "host1 slots=99999999999": ":1: 'host1 slots=99999999999': must be NAME slots=RANKS, RANKS 1 to 99999",
    f"host1 slots={'9' * 5000}": ":1: 'host1 slots=999",
    "host1 slots=2\nh\xe4st slots=2": ":2: 'h\ufffdst slots=2': must be NAME",  # not UTF-8
    "-oProxyCommand=id slots=2": ":1: '-oProxyCommand=id slots=2': must be NAME",
    "user@-oProxyCommand=id slots=2": ":1: 'user@-oProxyCommand=id slots=2': must be NAME",
    "-l@host1 slots=2": ":1: '-l@host1 slots=2': must be NAME",
    "host1;id slots=2": ":1: 'host1;id slots=2': must be NAME",
    "host\0 slots=2": ":1: 'host\\x00 slots=2': must be NAME",
}
NAMES = ["worker-1", "gpu_7.example.org", "user@10.0.0.1", "::1", "fe80::1%eth0"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    cluster.require()
    with Cluster(tmp_path_factory.mktemp("cluster"), 2) as made:
        yield made


def start(*arguments: object, env: dict[str, str] | None = None, script: str = "train.py", **settings: Any):
    line = [sys.executable, "-m", "launch.hosts", *map(str, arguments), script]
    line += [f"--{name}={value}" for name, value in settings.items()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    return subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("text", HOSTFILES, ids=lambda text: repr(text[:30]))
def test_an_invalid_hostfile(tmp_path, text):
    (tmp_path / "hostfile").write_text(text, "latin-1")
    with pytest.raises(UserError, match=re.escape(HOSTFILES[text])):
        hosts.read_hostfile(f"{tmp_path}/hostfile")


def test_names_that_a_host_can_have(tmp_path):
    (tmp_path / "hostfile").write_text(
        "\ufeff" + "".join(f"{name} slots=10 # comment \xe4\n" for name in NAMES), "utf-8"
    )
    assert hosts.read_hostfile(f"{tmp_path}/hostfile") == dict.fromkeys(NAMES, 10)


def test_invalid_options_are_one_message(tmp_path):
    hostfile = f"--hostfile={tmp_path}/hostfile"
    assert "no such hostfile" in message(start(hostfile))
    (tmp_path / "hostfile").write_text("host1 slots=2\n")
    assert re.search("--restarts=-1 train.py: must be .*, --restarts 0", message(start(hostfile, "--restarts=-1")))
    assert "--ssh=/no/ssh: must be a program and its options" in message(start(hostfile, "--ssh=/no/ssh"))


@pytest.mark.parametrize(
    "ssh, text", [("ssh -i 'key", "must be a program and its options"), (" ", "must be a program and its options")]
)
def test_an_invalid_ssh_command(ssh, text):
    with pytest.raises(UserError, match=f"^--ssh={ssh}: {text}"):
        hosts.ask({"host1": 1}, ssh, ["-m", "launch.machine"])


def test_what_a_host_prints_besides_its_answer(tmp_path):
    """A ~/.bashrc may print anything. An answer that has not the keys and types of ours is reported with the host."""
    (tmp_path / "hostfile").write_text("host1 slots=2\n")
    (tmp_path / "printed").write_bytes(b'welcome\n\xff{ hi\n{ hi }\n{"code": "a"}\n[1]\n')
    ssh = tmp_path / "ssh"
    ssh.write_text(
        f'#!/bin/sh\ncat {tmp_path}/printed\nfor command; do :; done\n[ -e {tmp_path}/mute ] || eval "$command"\n'
    )
    ssh.chmod(0o755)
    hosts_file = hosts.read_hostfile(f"{tmp_path}/hostfile")

    def answer() -> Any:
        return hosts.ask(hosts_file, str(ssh), ["-m", "launch.machine"])["host1"]

    right = answer()
    assert right.items() >= {"code": machine.describe()["code"], "gpus": machine.count_gpus()}.items()
    (tmp_path / "mute").touch()
    wrong = [{}, {**right, "code": 1}, {**right, "gpus": "8"}, {**right, "torch": None}]
    for text in ("{ hi", "7", "[" * 100_000, *map(json.dumps, wrong)):
        (tmp_path / "printed").write_text(text)
        assert answer().startswith(f"printed {text[:80]!r} instead of an answer; `ssh host1` must work"), text
    text = message(start(f"--hostfile={tmp_path}/hostfile", f"--ssh={ssh}"))
    assert text.splitlines()[1].startswith("  host1: printed '{")


def test_a_connection_that_is_lost_before_the_plan_is_sent_names_its_host(tmp_path):
    """An ssh that answers, and then ends at once, while launch.hosts still writes the plan."""
    (tmp_path / "hostfile").write_text("host1 slots=2\n")
    ssh = tmp_path / "ssh"
    ssh.write_text('#!/bin/sh\nfor command; do :; done\ncase $command in *--node) exit 255 ;; esac\neval "$command"\n')
    ssh.chmod(0o755)
    slow = "import json, time; write = json.dumps; json.dumps = lambda plan: time.sleep(1) or write(plan)"
    line = [sys.executable, "-c", f"{slow}; from launch import hosts; exit(hosts.main())"]
    line += [f"--hostfile={tmp_path}/hostfile", f"--ssh={ssh}", "--master_addr=localhost", "train.py"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.stderr, done.returncode) == ("launch.hosts: host1: the connection was lost\n", LOST)


def test_the_file_with_the_environment_for_deepspeeds_launcher_is_private(tmp_path):
    """The command line of docs/multi_node.md, over a file that everyone could read."""
    write = re.search(r"`(env \| .* \.deepspeed_env)`", (ROOT / "docs/multi_node.md").read_text())
    (tmp_path / ".deepspeed_env").touch(0o644)
    env = {**os.environ, "WANDB_API_KEY": "secret"}
    assert write and subprocess.run(["sh", "-c", write[1]], cwd=tmp_path, env=env).returncode == 0
    assert (tmp_path / ".deepspeed_env").stat().st_mode & 0o777 == 0o600
    assert "WANDB_API_KEY=secret\n" in (tmp_path / ".deepspeed_env").read_text()


def test_unreachable_hosts_are_listed_with_the_reason(made, tmp_path):
    (tmp_path / "hostfile").write_text(f"host1 slots=2\n{made.subnet.format(254)} slots=2\nnobody.invalid slots=2\n")
    text = message(start(f"--hostfile={tmp_path}/hostfile", f"--ssh={made.ssh}"))
    assert text.startswith("2 problems with the hosts\n")
    assert f"{made.subnet.format(254)}: ssh: connect to host" in text
    assert "nobody.invalid: ssh: Could not resolve hostname nobody.invalid" in text
    cluster.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "key")
    other = f"ssh -o UserKnownHostsFile={made.folder}/known_hosts -i {tmp_path}/key -o IdentitiesOnly=yes"
    text = message(start(f"--hostfile={made.hostfile(2, by='address')}", f"--ssh={other}"))
    assert text.count("Permission denied") == text.count("must work without a password (ssh-copy-id ") == 2
    assert not made.left()


def test_a_loopback_address(made):
    hostfile = f"--hostfile={made.hostfile(1)}"
    text = message(start(hostfile, f"--ssh={made.ssh}", "--master_addr=localhost"))
    assert "localhost is 127.0.0.1, so each host would reach itself; set --master_addr to its address" in text


def test_a_wrong_network_interface_is_reported(made, tmp_path, data):
    settings = {**TINY, "dataset": data, "out_dir": tmp_path, "gradient_accumulation_steps": 2, "hang_minutes": 0.1}
    env = {"GLOO_SOCKET_IFNAME": "eth7"}
    done = start(f"--hostfile={made.hostfile(1)}", f"--ssh={made.ssh}", env=env, **settings)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "rank 0 could not join the others at " in done.stderr
    assert "name the right network in GLOO_SOCKET_IFNAME" in done.stderr
    assert not made.left()


def test_data_that_one_host_lacks(made, tmp_path):
    settings = {**TINY, "dataset": tmp_path / "no", "out_dir": tmp_path / "out", "gradient_accumulation_steps": 2}
    text = start(f"--hostfile={made.hostfile(1)}", f"--ssh={made.ssh}", **settings)
    assert text.returncode == 2 and text.stderr.count("error: ") == 1 and f"{tmp_path}/no" in text.stderr


def test_hosts_with_too_few_gpus_are_listed():
    two = {"one": 8, "two": 8}
    hosts.check(two, {"one": {"gpus": 8}, "two": {"gpus": 0}})
    with pytest.raises(UserError) as error:
        hosts.check(two, {"one": {"gpus": 8}, "two": {"gpus": 4}})
    assert str(error.value) == "1 problem with the hosts\n  two: slots=8, but it has 4 GPUs"


def test_address_of_the_first_host():
    assert hosts.master_address({"localhost": 1}, {}) == "127.0.0.1"
    with pytest.raises(UserError, match="each host would reach itself"):
        hosts.master_address({"localhost": 1, "two": 1}, {})
    for name in ("nobody.invalid", "a" * 70):
        with pytest.raises(UserError, match=f"{name} has no known address; set --master_addr"):
            hosts.master_address({name: 1}, {name: {"address": ""}})
    assert socket.gethostbyname("localhost") == "127.0.0.1"
