"""doctor.py: faults planted on real hosts are all named, links are measured as limited, nothing is left behind."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from typing import Any

import pytest

from tests import cluster
from tests.cluster import Cluster, Host
from tests.running import ROOT, TINY, message, zero_json
from training.deepspeed_config import DeepSpeedTrainConfig
from training.doctor import needs, report
from training.doctor.links import Network
from training.hostfile import Host as Named

SETTINGS: dict[str, Any] = {**TINY, "gradient_accumulation_steps": 8}
NVME: dict[str, Any] = {"deepspeed_config": zero_json("zero3_nvme")}


def start(*arguments: str, env: dict[str, str] | None = None, **settings: Any) -> subprocess.Popen:
    given = {**SETTINGS, **settings} if settings else {}
    line = [sys.executable, "doctor.py", *arguments, *(f"--{name}={value}" for name, value in given.items())]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    streams: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    streams["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's & has it ignored
    return subprocess.Popen(line, cwd=ROOT, env=environment, **streams)


def doctor(*arguments: str, env: dict[str, str] | None = None, **settings: Any) -> subprocess.CompletedProcess:
    process = start(*arguments, env=env, **settings)
    output, errors = process.communicate(timeout=120)
    assert "Traceback" not in errors, errors
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def over(trio: Cluster) -> list[str]:
    return [f"--hostfile={trio.hostfile(2)}", f"--ssh={trio.ssh}"]


def plant(host: Host, *command: object) -> None:
    """In the host's mount namespace, which the others do not see."""
    cluster.run("nsenter", f"--target={sshd(host)}", "--mount", *command)


def sshd(host: Host) -> int:
    return host.sshd.pid if host.sshd else 0


def gigabits(finding: dict[str, Any]) -> float:
    return float(finding["value"].split()[0].replace(",", ""))


def test_this_machine_is_well(tmp_path, data):
    done = doctor("--json", dataset=data, out_dir=tmp_path / "not" / "yet", **NVME, nvme_path=tmp_path)
    found = json.loads(done.stdout)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert found["hosts"] == ["this machine"]
    findings = {finding["check"]: finding for finding in found["findings"]}
    assert findings.keys() == {*report.RULES, "all-reduce"}
    assert all(finding.keys() == {"check", "host", "value", "ok", "fix"} for finding in findings.values())
    assert findings["libaio"]["ok"] and findings["NVMe"]["ok"] and gigabits(findings["all-reduce"]) > 0.1
    assert list(tmp_path.iterdir()) == []  # neither out_dir nor what disks are measured with


def test_what_one_machine_lacks_is_red_with_the_fix(tmp_path):
    gone = {"dataset": tmp_path / "gone", "nvme_path": tmp_path / "disk", **NVME}
    done = doctor("--ranks=1", env={"CXX": "no-such-compiler"}, out_dir=tmp_path, **gone)
    red = dict(re.findall(r"^FAIL  (.+?)  +(.+)\n {6}\S", done.stdout, re.M))  # a fix stands below
    assert red == {
        "C++ compiler": "no-such-compiler: missing",
        "data set": f"{tmp_path}/gone: no train.bin and val.bin",
        "NVMe": f"{tmp_path}/disk: No such file or directory",
    }
    assert done.returncode == 1 and done.stdout.endswith(" checks, 3 to mend\n") and "\033" not in done.stdout


def test_a_wrong_option_is_told_as_by_the_train_scripts():
    assert "unknown key; did you mean batch_size?" in message(doctor("--batchsize=8"))


def test_planted_faults_are_all_named_and_the_others_go_on(trio, tmp_path, data):
    one, two, three = trio.hosts
    for name in ("out", "nvme"):
        (tmp_path / name).mkdir()
    (tmp_path / "plot.py").write_text((ROOT / "plot.py").read_text() + "# changed\n")
    plant(two, "mount", "--bind", tmp_path / "plot.py", ROOT / "plot.py")
    plant(two, "mount", "-t", "tmpfs", "-o", "size=1m", "none", "/dev/shm")
    plant(two, "mount", "-t", "tmpfs", "none", data)
    plant(three, "mount", "-t", "tmpfs", "none", tmp_path / "out")
    plant(three, "mount", "-t", "tmpfs", "-o", "ro", "none", tmp_path / "nvme")
    cluster.run("prlimit", f"--pid={sshd(one)}", "--nofile=300:300")
    away, options = trio.subnet.format(200), over(trio)
    (trio.folder / "hostfile").open("a").write(f"{away} slots=2\n")
    env, settings = (
        {"GLOO_SOCKET_IFNAME": "eth7"},
        {"dataset": data, "out_dir": tmp_path / "out", "nvme_path": tmp_path / "nvme", **NVME},
    )
    done = doctor(*options, "--json", env=env, **settings)
    red = [f for f in json.loads(done.stdout)["findings"] if f["ok"] is False]
    assert done.returncode == 1 and all(f["fix"] for f in red)
    assert {(f["check"], f["host"]) for f in red} == {
        *(("ssh", away), ("open files", "host1"), ("code", "host2"), ("shared memory", "host2"), ("data set", "host2")),
        *(("out_dir, shared", "host3"), ("NVMe", "host3")),
        *(("all-reduce", "host1 - host2"), ("all-reduce", "host2 - host3")),
    }
    assert not trio.left() and not list((tmp_path / "out").iterdir())


def test_ranks_that_hang_are_given_up(tmp_path):
    (tmp_path / "hang.py").write_text(f"import time\nopen({str(tmp_path / 'begun')!r}, 'w')\ntime.sleep(1000)\n")
    begun, here = time.monotonic(), Named("this machine", (0, 1))
    network = Network({here.name: {"gpus": 0, "port": 0}}, "", "localhost", {}, [f"{tmp_path}/hang.py"], 2)
    (link,) = network.measure([here], print)
    assert link.problem == "no all-reduce within 2 s"
    assert (tmp_path / "begun").exists() and time.monotonic() - begun < 10
    assert not cluster.run("pgrep", "-f", tmp_path / "hang.py", check=False)


def test_bandwidths_are_those_that_the_links_are_limited_to(trio, tmp_path, data):
    for host, rate in zip(trio.hosts, ("100mbit", "1gbit", "1gbit"), strict=True):
        host.limit(rate)
    done = doctor(*over(trio), "--json", dataset=data, out_dir=tmp_path)
    found = {f["host"]: f for f in json.loads(done.stdout)["findings"] if f["check"] == "all-reduce"}
    print({host: f["value"].split(";")[0] for host, f in found.items()})
    assert done.returncode == 1 and not found["host1 - host2"]["ok"], "a tenth of the other is too slow"
    assert found["host2 - host3"]["ok"]
    for host, limit in {"host1 - host2": 0.1, "host2 - host3": 1.0, "all 3 hosts": 0.1}.items():
        assert abs(gigabits(found[host]) / limit - 1) <= 0.2, found


@pytest.mark.parametrize("moment", ["training.doctor.interview", "all_reduce.py"])
def test_ctrl_c_leaves_nothing_anywhere(trio, tmp_path, data, moment):
    (tmp_path / "out").mkdir()
    process = start(*over(trio), dataset=data, out_dir=tmp_path / "out")
    while not any(moment in cluster.run("ps", "-o", "args=", 1, *host.pids(), check=False) for host in trio.hosts):
        assert process.poll() is None, "it ended before"
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == -signal.SIGINT and "Traceback" not in errors, errors
    assert not trio.left() and not list((tmp_path / "out").iterdir())


# What cannot be planted here: GPUs, clocks that differ, other versions.

FACTS: dict[str, Any] = {
    **{"code": "abc", "python": "3.11.7", "gpus": 8, "usable": "8", "cuda": "12.8", "memory": 10**12, "cores": 64},
    "packages": {"torch": "2.13.0", "deepspeed": "0.19.8", "numpy": "2.4.6", "tiktoken": "0.14.0"},
    "gpu": [{"name": "NVIDIA H100", "driver": "570.12", "free": 80 * 10**9}] * 8,
    "tools": {"CXX": "c++", **dict.fromkeys(("compiler", "headers", "ninja", "libaio", "nvcc"), "/x")},
    "limits": dict.fromkeys(("open files", "locked memory", "processes")),
    **{"shm": 10**10, "port": 29500, "skew": 0.002, "shared": True, "nvme": None, "addresses": ["10.0.0.1"]},
    "out_dir": {"folder": "out", "error": "", "free": 10**13, "write": 1e9, "read": 2e9},
    "data": {"train.bin": 1000, "val.bin": 100},
}
WRONG: list[tuple[str, dict[str, Any]]] = [
    ("Python", {"python": "3.12.1"}),
    ("torch", {"packages": {**FACTS["packages"], "torch": "2.5.1"}}),
    ("torch", {"cuda": None}),
    ("DeepSpeed", {"packages": {**FACTS["packages"], "deepspeed": "missing"}}),
    ("other packages", {"packages": {**FACTS["packages"], "numpy": "2.4.5"}}),
    ("GPUs", {"gpus": 4, "gpu": FACTS["gpu"][:4], "usable": "4"}),
    ("GPUs", {"gpus": 0, "gpu": [], "usable": "0"}),
    ("GPUs", {"usable": "RuntimeError: The NVIDIA driver on your system is too old"}),
    ("GPU memory", {"gpu": [{"name": "NVIDIA H100", "driver": "570.12", "free": 10**8}] * 8}),
    ("memory", {"memory": 10**9}),
    ("shared memory", {"shm": 64 * 2**20}),
    ("locked memory", {"limits": {**FACTS["limits"], "locked memory": 8 * 2**20}}),
    ("processes", {"limits": {**FACTS["limits"], "processes": 1024}}),
    ("cores", {"cores": 7}),
    ("clock", {"skew": -1.5}),
    ("out_dir, space", {"out_dir": {**FACTS["out_dir"], "free": 10**9}}),
    ("out_dir, speed", {"out_dir": {**FACTS["out_dir"], "write": 1e6}}),
    ("data set", {"data": {"train.bin": 999, "val.bin": 100}}),
    ("data set", {"data": {"train.bin": 1000, "val.bin": None}}),
]


@pytest.mark.parametrize("check, wrong", WRONG)
def test_a_host_with_gpus_that_is_not_as_the_first(check, wrong):
    hosts = [Named("one", tuple(range(8))), Named("two", tuple(range(8)))]
    cfg = DeepSpeedTrainConfig(gradient_accumulation_steps=48)
    need = needs.of(cfg, {"zero_optimization": {"stage": 2}}, ranks=16, hosts=2, known=True)
    assert not [f for f in report.judge(hosts, {"one": FACTS, "two": FACTS}, need, "ssh") if f.ok is False]
    red = [f for f in report.judge(hosts, {"one": FACTS, "two": {**FACTS, **wrong}}, need, "ssh") if f.ok is False]
    assert (check, "two") in {(f.check, f.host) for f in red} and all(f.host == "two" and f.fix for f in red)
