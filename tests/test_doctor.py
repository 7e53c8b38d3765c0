"""tools.doctor: reports all faults planted on real hosts, measures links as limited, leaves nothing behind."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from typing import Any

import pytest

from launch import hosts as launch_hosts
from launch import machine
from model import GPTConfig
from tests import cluster
from tests.cluster import Cluster, Host
from tests.running import ROOT, TINY, message, start_process, zero_json
from tools import doctor as doctor_tool
from tools import doctor_host
from tools.plan import RecipeConfig
from training.errors import ConfigError

SETTINGS: dict[str, Any] = {**TINY, "gradient_accumulation_steps": 8}
NVME: dict[str, Any] = {"deepspeed_config": zero_json("zero3_nvme")}


def start(*arguments: str, env: dict[str, str] | None = None, **settings: Any) -> subprocess.Popen:
    settings = {**SETTINGS, **settings} if settings else {}
    line = [
        sys.executable,
        "-m",
        "tools.doctor",
        *arguments,
        *(f"--{name}={value}" for name, value in settings.items()),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    return start_process(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


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


@pytest.mark.needs("libaio")
def test_this_machine_passes(tmp_path, data):
    done = doctor("--json", dataset=data, out_dir=tmp_path / "not" / "yet", **NVME, nvme_path=tmp_path)
    found = json.loads(done.stdout)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    findings = {finding["check"]: finding for finding in found}
    assert {"GPUs", "memory", "shared memory", "data set", "out_dir, space"} < findings.keys()
    assert all(finding.keys() == {"check", "host", "value", "ok", "fix"} for finding in findings.values())
    assert findings["libaio"]["ok"] and findings["NVMe, space"]["ok"] and gigabits(findings["all-reduce"]) > 0.1
    assert list(tmp_path.iterdir()) == []  # neither out_dir nor the files that were tried


@pytest.mark.parametrize("header", [True, False])
def test_nvme_offload_on_a_gpu_needs_the_cuda_toolkit(tmp_path, header):
    (tmp_path / "include").mkdir()
    if header:
        (tmp_path / "include" / "cuda.h").touch()
    environment = {"CUDA_HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    findings = {gpus: list(doctor_host.check_compiler(["async_io"], environment, gpus)) for gpus in (0, 1)}
    (toolkit,) = [finding for finding in findings[1] if "CUDA" in finding.check]
    assert toolkit.ok is header and "set CUDA_HOME" in toolkit.fix and len(findings[0]) == len(findings[1]) - 1


@pytest.mark.needs("libaio")
def test_what_one_machine_lacks_is_reported_with_the_fix(tmp_path):
    gone = {"dataset": tmp_path / "gone", "nvme_path": tmp_path / "disk", **NVME}
    done = doctor("--ranks=1", env={"CXX": "no-such-compiler"}, out_dir=tmp_path, **gone)
    failed = dict(re.findall(r"^FAIL  (.+?)  +localhost  +(.+)\n {6}\S", done.stdout, re.M))  # a fix stands below
    assert failed == {
        "C++ compiler no-such-compiler": "missing",
        "data set": "gone: no train.bin and val.bin",
        "NVMe, space": f"{tmp_path}/disk: No such file or directory",
    }
    assert done.returncode == 1 and done.stdout.endswith("\n3 checks failed\n")
    lines = [line for line in done.stdout.splitlines() if not line.startswith(" ")]
    assert lines[0].startswith("1 rank: --device=cpu --compile=False ")
    assert [line[:6] for line in lines[1:5]] == ["FAIL  ", "FAIL  ", "FAIL  ", "ok    "], "what is wrong comes first"


def test_an_unknown_key_is_reported_as_by_the_train_scripts():
    assert "unknown key; did you mean batch_size?" in message(doctor("--batchsize=8"))


def test_a_recipe_of_fsdp(tmp_path, data):
    recipe = ("config/train_gpt2_fsdp.py", f"--dataset={data}", f"--out-dir={tmp_path}", "--device=cpu")
    done = doctor(*recipe)
    assert done.returncode == 0 and re.search(r"^ok    GPUs +localhost +none$", done.stdout, re.M)
    assert "C++ compiler" not in done.stdout, "FSDP needs none"
    assert done.stdout.startswith("2 ranks: config/train_gpt2_fsdp.py --dataset=")
    done = doctor(*recipe, "--gpus=1")
    assert done.returncode == 0 and done.stdout.startswith("1 rank: config/train_gpt2_fsdp.py --dataset=")


def test_model_state_by_strategy():
    """Bytes of a rank: FSDP's fp32 parameters, gradients, moments; ZeRO-2's, with a copy of the parameters in fp32."""
    hosts = {"one": 2, "two": 2}
    for settings, shards in (({"strategy": "fsdp"}, 4), ({"strategy": "fsdp", "shard_ranks": 2}, 2)):
        cfg = RecipeConfig(**settings)
        size = doctor_tool.make_requests(cfg, hosts, True)["two"]["state_bytes"]
        count = GPTConfig(vocab_size=50304, bias=False).parameter_count()
        assert size == {"gpu": 16 * count / shards, "cpu": 0, "nvme": 0}
        offloaded = doctor_tool.make_requests(replace(cfg, cpu_offload=True), hosts, True)["one"]
        assert offloaded["state_bytes"] == {"gpu": 0, "cpu": 16 * count / shards, "nvme": 0}
    size = doctor_tool.make_requests(RecipeConfig(), hosts, True)["two"]["state_bytes"]
    assert size == {"gpu": 4 * count + (4 + 12) * count / 4, "cpu": 0, "nvme": 0}
    untied = RecipeConfig(deepspeed_config=zero_json("zero1"), tied=False, pipeline_parallel=4, compile=False)
    (stage,) = doctor_tool.make_requests(untied, {"one": 4}, True).values()
    head = 50304 * 768  # the first stage also has the embeddings
    assert stage["state_bytes"]["gpu"] == pytest.approx((4 + 4 + 12) * ((count - head) / 4 + head), rel=0.03)
    with pytest.raises(ConfigError, match="must divide the number of ranks, 3, as 3 does"):
        doctor_tool.make_requests(untied, {"one": 3}, True)


@pytest.mark.needs("libaio")
def test_planted_faults_are_all_reported(trio, tmp_path, data):
    _, two, three = trio.hosts
    for name in ("out", "nvme"):
        (tmp_path / name).mkdir()
    (tmp_path / "sample.py").write_text((ROOT / "sample.py").read_text() + "# changed\n")
    plant(two, "mount", "--bind", tmp_path / "sample.py", ROOT / "sample.py")
    plant(two, "mount", "-t", "tmpfs", "none", data)
    plant(three, "mount", "-t", "tmpfs", "none", tmp_path / "out")
    plant(three, "mount", "-t", "tmpfs", "-o", "ro", "none", tmp_path / "nvme")
    away, options = trio.subnet.format(200), over(trio)
    (trio.folder / "hostfile").open("a").write(f"{away} slots=2\n")
    env, settings = (
        {"GLOO_SOCKET_IFNAME": "eth7"},
        {"dataset": data, "out_dir": tmp_path / "out", "nvme_path": tmp_path / "nvme", **NVME},
    )
    done = doctor(*options, "--json", env=env, **settings)
    failed = [f for f in json.loads(done.stdout) if f["ok"] is False]
    assert done.returncode == 1 and all(f["fix"] for f in failed)
    assert {(f["check"], f["host"]) for f in failed} == {
        *(
            ("ssh", away),
            ("code of all hosts", "host2"),
            ("data set", "host2"),
        ),
        *(("data of all hosts", "host2"), ("out_dir, shared", "host3"), ("NVMe, space", "host3")),
        *(("all-reduce", name) for name in ("host1 - host2", "host2 - host3", "all 3 hosts")),
    }
    assert not trio.left() and not list((tmp_path / "out").iterdir())


def test_ranks_that_hang_are_killed(tmp_path, monkeypatch):
    (tmp_path / "hang.py").write_text(f"import time\nopen({str(tmp_path / 'begun')!r}, 'w')\ntime.sleep(1000)\n")
    begun = time.monotonic()
    answers = {"localhost": {"gpus": 0, "port": 0}}
    monkeypatch.setattr(launch_hosts, "ANSWER_SECONDS", 2.0)
    (finding,) = doctor_tool.check_links({"localhost": 2}, answers, "", "", [f"{tmp_path}/hang.py"])
    assert (finding.value, finding.ok) == ("no answer within 2 s", False)
    assert (tmp_path / "begun").exists() and time.monotonic() - begun < 10
    assert not cluster.run("pgrep", "-f", tmp_path / "hang.py", check=False)


def test_measured_bandwidths_are_the_limits_of_the_links(trio, tmp_path, data):
    for host, rate in zip(trio.hosts, ("100mbit", "1gbit", "1gbit"), strict=True):
        host.limit(rate)
    done = doctor(*over(trio), "--json", dataset=data, out_dir=tmp_path)
    found = {f["host"]: f for f in json.loads(done.stdout) if f["check"] == "all-reduce"}
    print({host: f["value"].split(";")[0] for host, f in found.items()})
    assert done.returncode == 1 and not found["host1 - host2"]["ok"], "a tenth of the other is too slow"
    assert found["host2 - host3"]["ok"]
    for host, limit in {"host1 - host2": 0.1, "host2 - host3": 1.0, "all 3 hosts": 0.1}.items():
        assert abs(gigabits(found[host]) / limit - 1) <= 0.2, found


@pytest.mark.parametrize("moment", ["tools.doctor_host", "all_reduce"])
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


# Faults that cannot be planted here: GPUs, other versions.

FACTS: dict[str, Any] = {
    **{**dict.fromkeys(machine.SAME, "1.0"), "code": "abc", "torch": "2.13.0", "device": "GPU", "data": 1000},
    "findings": [],
}


@pytest.mark.parametrize(
    "check, other, value",
    [
        ("code of all hosts", {"code": "abd"}, "abd, but abc on one"),
        ("python of all hosts", {"python": "3.12.1"}, "3.12.1, but 1.0 on one"),
        ("torch of all hosts", {"torch": "2.5.1"}, "2.5.1, but 2.13.0 on one"),
        ("device of all hosts", {"device": "CPU"}, "CPU, but GPU on one"),
        ("data of all hosts", {"data": 999}, "999, but 1000 on one"),
    ],
)
def test_a_host_that_differs_from_the_first(check, other, value):
    assert all(finding.ok for finding in doctor_tool.compare({"one": FACTS, "two": FACTS}))
    (failed,) = [f for f in doctor_tool.compare({"one": FACTS, "two": {**FACTS, **other}}) if not f.ok]
    assert (failed.check, failed.host, failed.value) == (check, "two", value) and failed.fix


ENOUGH: dict[str, Any] = {
    **{"slots": 4, "device": "auto", "environment": {}, "ops": [], "nvme_path": "", "out_dir": "out"},
    **{"state_bytes": {"gpu": 0, "cpu": 0, "nvme": 0}, "kept_bytes": 0, "dataset": "", "marker": ""},
    **{"nccl_shm_bytes": 0, "shm_fix": "enlarge it"},
}


PACKAGES = {"torch": "2.13.0", "deepspeed": "0.19.8", "numpy": "2.4.6", "tiktoken": "0.14.0"}
TORCH = [[2, 11], [2, 14]]


def failed_checks(tmp_path, monkeypatch, gpus=4, usable="4", free=80_000, packages=None, **changes) -> set[str]:
    """Checks that fail on a machine whose nvidia-smi lists GPUs, of which torch can use some."""
    smi = tmp_path / "nvidia-smi"
    cards = "\n".join(f"echo GPU {number}: H100" for number in range(gpus))
    smi.write_text(f"#!/bin/sh\nif [ $1 = -L ]; then {cards or ':'}\nelse echo 'H100, {free}, 570.12'; fi\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(doctor_host, "COUNT_GPUS", f"print({usable!r})")
    request = {**ENOUGH, "out_dir": str(tmp_path), **changes}
    count = doctor_host.machine.count_gpus() if request["device"] != "cpu" else 0
    findings = [*doctor_host.check_software(packages or PACKAGES, TORCH), *doctor_host.check_gpus(request, count)]
    findings += [*doctor_host.check_memory(request, count), *doctor_host.check_storage(request)]
    assert all(finding.fix for finding in findings if finding.ok is False)
    return {finding.check for finding in findings if finding.ok is False}


@pytest.mark.parametrize(
    "check, changes",
    [
        ("GPUs", {"slots": 8}),
        ("GPUs", {"usable": "RuntimeError: The NVIDIA driver on your system is too old"}),
        ("GPUs", {"usable": "AssertionError: Torch not compiled with CUDA enabled"}),
        ("GPUs", {"usable": "2"}),
        ("GPUs", {"gpus": 0, "device": "cuda"}),
        ("GPU memory", {"free": 100, "state_bytes": {"gpu": 10**9, "cpu": 0, "nvme": 0}}),
        ("memory", {"state_bytes": {"gpu": 0, "cpu": 10**15, "nvme": 0}}),
        ("shared memory", {"nccl_shm_bytes": 10**15}),
        ("memory", {"device": "cpu", "state_bytes": {"gpu": 10**15, "cpu": 0, "nvme": 0}}),
        ("out_dir, space", {"kept_bytes": 10**17}),
        ("NVMe, space", {"nvme_path": ".", "state_bytes": {"gpu": 0, "cpu": 0, "nvme": 10**16}}),
    ],
)
def test_a_machine_that_has_too_little(tmp_path, monkeypatch, check, changes):
    assert failed_checks(tmp_path, monkeypatch) == set()
    assert failed_checks(tmp_path, monkeypatch, **changes) == {check}


@pytest.mark.parametrize("check, package, version", [("torch", "torch", "2.5.1"), ("packages", "deepspeed", "missing")])
def test_packages_that_are_too_old_or_missing(tmp_path, monkeypatch, check, package, version):
    assert failed_checks(tmp_path, monkeypatch, device="cpu", packages={**PACKAGES, package: version}) == {check}
