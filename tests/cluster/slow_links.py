"""What each way to train over a slow link sends, how fast it is, and where its loss is after the same tokens.

    python -m tests.cluster.slow_links results/slow_links

Two hosts with two ranks each, which are network namespaces of one machine. Writes README.md and results.json.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from tests.cluster import Cluster, Host
from tests.running import ROOT, command, rows, zero_json
from tests.words import words
from training.distributed import SINGLE_PROCESS
from training.run_folder import environment

RATES = ("1gbit", "100mbit")
STEPS = 60
SETTINGS: dict[str, Any] = {"n_layer": 4, "n_head": 4, "n_embd": 256, "block_size": 128, "batch_size": 2}
SETTINGS |= {"gradient_accumulation_steps": 4, "learning_rate": 1e-3, "min_lr": 1e-4, "warmup_iters": 10}
SETTINGS |= {"max_iters": STEPS, "lr_decay_iters": STEPS, "eval_interval": STEPS, "eval_iters": 40}
SETTINGS |= {"device": "cpu", "compile": False, "log_interval": 1, "always_save_checkpoint": False}
METHODS: dict[str, dict[str, Any]] = {
    "DDP": {},
    "DDP, `grad_dtype=bfloat16`": {"grad_dtype": "bfloat16"},
    "DDP, `grad_compression=powersgd`": {"grad_compression": "powersgd"},
    "DiLoCo, `outer_steps=10`": {"outer_steps": 10},
    "DiLoCo, `outer_steps=10 grad_dtype=bfloat16`": {"outer_steps": 10, "grad_dtype": "bfloat16"},
    "FSDP2": {"strategy": "fsdp"},
    "HSDP, `shard_ranks=2`": {"strategy": "fsdp", "shard_ranks": 2},
    "ZeRO-2": {"deepspeed_config": zero_json("zero2")},
    "ZeRO-3": {"deepspeed_config": zero_json("zero3")},
    "ZeRO-3 with hpZ": {"deepspeed_config": zero_json("zero3_hpz")},
}


def sent_bytes(host: Host) -> int:
    return int(host.inside("cat", "/sys/class/net/eth0/statistics/tx_bytes"))


def measure(cluster: Cluster, data: Path, folder: Path, method: str) -> dict[str, Any]:
    given = {**SETTINGS, "dataset": data, "out_dir": folder, **METHODS[method]}
    script = "train_deepspeed.py" if "deepspeed_config" in given else "train.py"
    head = [sys.executable, "-m", "launch.hosts", f"--hostfile={cluster.hostfile(2)}", f"--ssh={cluster.ssh}"]
    before = sent_bytes(cluster.hosts[1])
    subprocess.run([*head, *command(script, **given)[1:]], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    sent = sent_bytes(cluster.hosts[1]) - before  # with evaluation, start and heartbeats
    times = [row["step_ms"] for row in rows(folder, "train") if row["step_ms"]]
    if "outer_steps" in given:  # the step that exchanges weights is one of ten
        times = [sum(times) / len(times)]
    tokens = SETTINGS["gradient_accumulation_steps"] * SETTINGS["batch_size"] * SETTINGS["block_size"]
    return {
        "tokens_per_second": 1e3 * tokens / median(times),
        "megabytes_per_step": sent / STEPS / 1e6,
        "val_loss": rows(folder, "eval")[-1]["val_loss"],
    }


def main(target: Path) -> None:
    results: dict[str, dict[str, Any]] = {method: {} for method in METHODS}
    with tempfile.TemporaryDirectory() as scratch, Cluster(Path(scratch), 2) as cluster:
        data = words(Path(scratch) / "words")
        for rate in RATES:
            for host in cluster.hosts:
                host.limit(rate)
            for number, method in enumerate(METHODS):
                results[method][rate] = measure(cluster, data, Path(scratch) / f"{rate}-{number}", method)
                print(rate, method, results[method][rate], flush=True)
    target.mkdir(parents=True, exist_ok=True)
    about = environment(SINGLE_PROCESS)
    (target / "results.json").write_text(json.dumps({"environment": about, "results": results}, indent=1) + "\n")
    table = [f"| method | {' | '.join(f'tokens/s at {rate}' for rate in RATES)} | MB per step | val loss |"]
    table.append("|---|" + "---:|" * (len(RATES) + 2))
    for method, by_rate in results.items():
        speeds = " | ".join(f"{one['tokens_per_second']:,.0f}" for one in by_rate.values())
        slowest = by_rate[RATES[-1]]
        table.append(f"| {method} | {speeds} | {slowest['megabytes_per_step']:.2f} | {slowest['val_loss']:.4f} |")
    facts = [f"- {key}: {about[key]}" for key in ("started", "git_commit", "python", "torch", "deepspeed", "device")]
    facts += [f"- settings: {' '.join(f'{key}={value}' for key, value in SETTINGS.items())}"]
    title = f"# Slow links\n\nTwo hosts with two CPU ranks each, fp32, {STEPS} steps. MB: what the second host sends.\n"
    (target / "README.md").write_text("\n".join([title, *table, "", *facts]) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
