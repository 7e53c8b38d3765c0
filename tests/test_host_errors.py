"""Hosts that cannot be used are listed before anything starts, each with the fix."""

import os
import socket
import subprocess
import sys
from typing import Any

import pytest

from launch import hosts
from launch.hosts import Host
from tests import cluster
from tests.cluster import Cluster
from tests.running import ROOT, TINY, message
from training.errors import UserError

HOSTFILES = {
    "": "is empty; write one line per host: NAME slots=RANKS",
    "host1 slots=2\nhost2\n": ":2: 'host2': must be NAME slots=RANKS, RANKS 1 or more",
    "host1 slots=0": ":1: 'host1 slots=0': must be NAME slots=RANKS",
    "# mine\n\nhost1 slots=2\nhost1 slots=2": ":4: host1 is a duplicate; give each host one line",
}


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


@pytest.mark.parametrize("text", HOSTFILES)
def test_an_invalid_hostfile(tmp_path, text):
    (tmp_path / "hostfile").write_text(text)
    assert HOSTFILES[text] in message(start(f"--hostfile={tmp_path}/hostfile"))


def test_no_hostfile_and_unknown_hosts(tmp_path):
    assert "no such hostfile" in message(start(f"--hostfile={tmp_path}/hostfile"))
    (tmp_path / "hostfile").write_text("host1 slots=2\n")
    assert "host3: no such host" in message(start(f"--hostfile={tmp_path}/hostfile", "--include=host3"))
    assert "host1 has no slot 5; it has 2" in message(start(f"--hostfile={tmp_path}/hostfile", "--include=host1:5"))
    assert "leaves no host" in message(start(f"--hostfile={tmp_path}/hostfile", "--exclude=host1"))


def test_unreachable_hosts_are_listed_with_the_reason(made, tmp_path):
    (tmp_path / "hostfile").write_text(f"host1 slots=2\n{made.subnet.format(254)} slots=2\nnobody.invalid slots=2\n")
    text = message(start(f"--hostfile={tmp_path}/hostfile", f"--ssh={made.ssh}"))
    assert text.startswith("2 problems with the hosts\n")
    assert f"{made.subnet.format(254)}: ssh: connect to host" in text
    assert "nobody.invalid: ssh: Could not resolve hostname nobody.invalid" in text
    cluster.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "key")
    other = f"ssh -o UserKnownHostsFile={made.folder}/known_hosts -i {tmp_path}/key -o IdentitiesOnly=yes"
    text = message(start(f"--hostfile={made.hostfile(2, by='address')}", f"--ssh={other}"))
    assert text.count("Permission denied") == text.count("and without a password (ssh-copy-id ") == 2
    assert not made.left()


def test_a_port_in_use_and_a_loopback_address(made):
    first, hostfile = made.hosts[0], f"--hostfile={made.hostfile(1)}"
    listen = "import socket, time; s = socket.create_server(('', 29611)); time.sleep(60)"
    other = subprocess.Popen(["ip", "netns", "exec", first.space, sys.executable, "-c", listen])
    try:
        while not first.inside("ss", "-ltn", "sport", "=", "29611").count("LISTEN"):
            pass
        text = message(start(hostfile, f"--ssh={made.ssh}", "--master_port=29611"))
        assert "host1: --master_port is in use there; leave it out to get a free one" in text
    finally:
        other.kill()
        other.wait()
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


def test_differing_code_packages_and_gpus_are_listed():
    same = {"code": "a", "python": "3.11.7", "packages": {"torch": "2.13.0"}, "gpus": 8, "addresses": [], "port": 1}
    other = {**same, "packages": {"torch": "2.12.0"}, "code": "b"}
    two = [Host("one", tuple(range(8))), Host("two", tuple(range(8)))]
    hosts.check(two, {"one": same, "two": same})
    with pytest.raises(UserError) as error:
        hosts.check(two, {"one": same, "two": {**other, "gpus": 4}})
    assert str(error.value).splitlines()[1:] == [
        "  two: code differs from one: b (not a); install the same on every host",
        "  two: packages differs from one: torch 2.12.0 (not 2.13.0); install the same on every host",
        "  two: slots=8, but it has 4 GPUs",
    ]


def test_address_of_the_first_host():
    assert hosts.master_address([Host("localhost", (0,))], {}) == "127.0.0.1"
    with pytest.raises(UserError, match="each host would reach itself"):
        hosts.master_address([Host("localhost", (0,)), Host("two", (0,))], {})
    assert socket.gethostbyname("localhost") == "127.0.0.1"
