"""Hosts that cannot be used: named before anything starts, each with the fix."""

import os
import socket
import subprocess
import sys
from typing import Any

import pytest

from tests import cluster
from tests.cluster import Cluster
from tests.running import ROOT, TINY, message
from training import hosts
from training.errors import UserError
from training.hostfile import Host

HOSTFILES = {
    "": "is empty; write one line a host: NAME slots=RANKS",
    "host1 slots=2\nhost2\n": ":2: 'host2': must be NAME slots=RANKS, RANKS 1 or more",
    "host1 slots=0": ":1: 'host1 slots=0': must be NAME slots=RANKS",
    "# mine\n\nhost1 slots=2\nhost1 slots=2": ":4: host1 is there twice; give it one line",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    cluster.require()
    with Cluster(tmp_path_factory.mktemp("cluster"), 2) as made:
        yield made


def start(*arguments: object, env: dict[str, str] | None = None, script: str = "train.py", **settings: Any):
    line = [sys.executable, "launch_hosts.py", *map(str, arguments), script]
    line += [f"--{name}={value}" for name, value in settings.items()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    return subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("text", HOSTFILES)
def test_a_hostfile_that_cannot_be_read(tmp_path, text):
    (tmp_path / "hostfile").write_text(text)
    assert HOSTFILES[text] in message(start(f"--hostfile={tmp_path}/hostfile"))


def test_no_hostfile_and_hosts_that_it_does_not_have(tmp_path):
    assert "no such hostfile" in message(start(f"--hostfile={tmp_path}/hostfile"))
    (tmp_path / "hostfile").write_text("host1 slots=2\n")
    assert "host3: no such host" in message(start(f"--hostfile={tmp_path}/hostfile", "--include=host3"))
    assert "host1 has no slot 5; it has 2" in message(start(f"--hostfile={tmp_path}/hostfile", "--include=host1:5"))
    assert "leaves no host" in message(start(f"--hostfile={tmp_path}/hostfile", "--exclude=host1"))


@pytest.mark.parametrize("line", ["", "# NCCL", "export NCCL_DEBUG=INFO", "NCCL_DEBUG"])
def test_an_environment_file_that_deepspeed_would_die_of(tmp_path, line):
    path = tmp_path / "env"
    path.write_text(f"NCCL_DEBUG=INFO\n{line}\n")
    (tmp_path / "hostfile").write_text("host1 slots=1\n")
    told = message(start(f"--hostfile={tmp_path}/hostfile", env={"DS_ENV_FILE": str(path)}))
    assert told == f"{path}:2: {line!r}: must be NAME=VALUE, and no comment or empty line"


def test_hosts_out_of_reach_are_named_with_the_reason(made, tmp_path):
    (tmp_path / "hostfile").write_text(f"host1 slots=2\n{made.subnet.format(254)} slots=2\nnobody.invalid slots=2\n")
    told = message(start(f"--hostfile={tmp_path}/hostfile", f"--ssh={made.ssh}"))
    assert told.startswith("2 problems with the hosts\n")
    assert f"{made.subnet.format(254)}: nothing listens on its ssh port" in told
    assert "nobody.invalid: unknown name; write its address into the hostfile" in told
    cluster.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "key")
    other = f"ssh -o UserKnownHostsFile={made.folder}/known_hosts -i {tmp_path}/key -o IdentitiesOnly=yes"
    told = message(start(f"--hostfile={made.hostfile(2, by='address')}", f"--ssh={other}"))
    assert told.count("no login without a password; run ssh-copy-id") == 2
    assert not made.left()


def test_a_port_that_is_taken_and_an_address_that_leads_nowhere(made):
    first, hostfile = made.hosts[0], f"--hostfile={made.hostfile(1)}"
    listen = "import socket, time; s = socket.create_server(('', 29611)); time.sleep(60)"
    other = subprocess.Popen(["ip", "netns", "exec", first.space, sys.executable, "-c", listen])
    try:
        while not first.inside("ss", "-ltn", "sport", "=", "29611").count("LISTEN"):
            pass
        told = message(start(hostfile, f"--ssh={made.ssh}", "--master_port=29611"))
        assert "host1: --master_port is taken there; leave it out, and a free one is found" in told
    finally:
        other.kill()
        other.wait()
    told = message(start(hostfile, f"--ssh={made.ssh}", "--master_addr=localhost"))
    assert "localhost is 127.0.0.1, which leads each host to itself; set --master_addr to its address" in told


def test_a_wrong_network_is_named(made, tmp_path, data):
    settings = {**TINY, "dataset": data, "out_dir": tmp_path, "gradient_accumulation_steps": 2, "hang_minutes": 0.1}
    given = {"GLOO_SOCKET_IFNAME": "eth7"}
    done = start(f"--hostfile={made.hostfile(1)}", f"--ssh={made.ssh}", env=given, **settings)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "rank 0 could not join the others at " in done.stderr
    assert "name the right one in GLOO_SOCKET_IFNAME" in done.stderr
    assert not made.left()


def test_data_that_one_host_lacks(made, tmp_path):
    settings = {**TINY, "dataset": tmp_path / "no", "out_dir": tmp_path / "out", "gradient_accumulation_steps": 2}
    told = start(f"--hostfile={made.hostfile(1)}", f"--ssh={made.ssh}", **settings)
    assert told.returncode == 2 and told.stderr.count("error: ") == 1 and f"{tmp_path}/no" in told.stderr


def test_other_code_packages_and_gpus_are_named():
    same = {"code": "a", "python": "3.11.7", "packages": {"torch": "2.13.0"}, "gpus": 8, "addresses": [], "port": 1}
    other = {**same, "packages": {"torch": "2.12.0"}, "code": "b"}
    two = [Host("one", tuple(range(8))), Host("two", tuple(range(8)))]
    hosts.check(two, {"one": same, "two": same})
    with pytest.raises(UserError) as error:
        hosts.check(two, {"one": same, "two": {**other, "gpus": 4}})
    assert str(error.value).splitlines()[1:] == [
        "  two: other code than one: b (not a); bring the same onto every host",
        "  two: other packages than one: torch 2.12.0 (not 2.13.0); bring the same onto every host",
        "  two: slots=8, it has 4 GPUs",
    ]


def test_the_first_hosts_address_is_found():
    assert hosts.master([Host("localhost", (0,))], {}) == "127.0.0.1"
    with pytest.raises(UserError, match="leads each host to itself"):
        hosts.master([Host("localhost", (0,)), Host("two", (0,))], {})
    assert socket.gethostbyname("localhost") == "127.0.0.1"
