"""Rules about files: the run folder, the NVMe disk, the data set."""

from typing import Any

from data.dataset import missing
from training.batches import DATA
from training.doctor.case import NOT_NEEDED, Case, Verdict
from training.doctor.needs import SAVED
from training.units import gigabytes


def space(case: Case) -> Verdict:
    """For the newest checkpoints, the best, and the one that is being written."""
    needed, disk = case.need.kept(), case.facts["out_dir"]
    if disk["error"]:
        return f"{disk['folder']}: {disk['error']}", False, "make room or choose another --out_dir"
    value = f"{gigabytes(disk['free'])} free"
    if needed:
        value += (
            f", {gigabytes(needed)} needed: {case.need.cfg.keep_checkpoints + 2} checkpoints, {SAVED} B a parameter"
        )
    return value, disk["free"] >= needed, "make room, lower --keep_checkpoints or choose another --out_dir"


def speed(case: Case) -> Verdict:
    """A checkpoint must be written before the watchdog takes the run for hanging."""
    if not (rate := case.facts["out_dir"].get("write")):
        return "not measured", None, ""
    value, limit = rates(case.facts["out_dir"]), case.need.cfg.hang_minutes * 60
    seconds = case.need.written(case.ranks) / rate
    if case.need.parameters:
        value += f"; a checkpoint: {seconds:,.1f} s"
    fix = f"choose a faster --out_dir, or --hang_minutes={seconds // 30 + 1:.0f}"
    return value, not limit or seconds < limit, fix


def rates(disk: dict[str, Any]) -> str:
    return f"write {disk['write'] / 1e6:,.0f} MB/s, read {disk['read'] / 1e6:,.0f} MB/s"


def nvme(case: Case) -> Verdict:
    disk, needed = case.facts["nvme"], case.ranks * case.need.state("nvme")
    if not disk:
        return NOT_NEEDED
    if disk["error"]:
        return (
            f"{disk['folder']}: {disk['error']}",
            False,
            "set --nvme_path to a folder on a local NVMe disk of each host",
        )
    value = f"{disk['folder']}: {gigabytes(disk['free'])} free, {gigabytes(needed)} needed"
    return value, disk["free"] >= needed, "make room, or set --nvme_path elsewhere"


def nvme_speed(case: Case) -> Verdict:
    """A step reads and writes all of it."""
    disk, size = case.facts["nvme"], case.ranks * case.need.state("nvme")
    if not disk or disk["error"]:
        return NOT_NEEDED
    seconds = size / disk["write"] + size / disk["read"]
    return rates(disk) + (f"; a step: {seconds:,.1f} s" if size else ""), True, ""


def shared(case: Case) -> Verdict:
    """The ranks of a checkpoint write into one folder, and all read it when the run goes on."""
    if case.need.hosts == 1:
        return NOT_NEEDED
    if case.facts["shared"] is None:
        return f"{case.first} cannot write there", None, ""
    fix = "put --out_dir on a disk that all hosts share, at the same path"
    return case.need.cfg.out_dir if case.facts["shared"] else f"not that of {case.first}", case.facts["shared"], fix


def data(case: Case) -> Verdict:
    if not case.need.parameters:
        return "no config given", None, ""
    name = case.need.cfg.dataset
    here, there = case.facts["data"], case.facts_of_first["data"]
    if lacking := [file for file, size in here.items() if size is None]:
        prepare = missing(DATA / name).partition("; ")[2] or "prepare it again"
        fix = prepare if here == there else "bring the folder there from a host that has it"
        return f"{name}: no {' and '.join(lacking)}", False, fix
    if here != there and None not in there.values():
        return f"{name}: files of other sizes than {case.first}'s", False, f"bring the folder there from {case.first}"
    return f"{name}: {gigabytes(sum(here.values()))}", True, ""


def micro_steps(case: Case) -> Verdict:
    steps, ranks = case.need.cfg.gradient_accumulation_steps, case.need.ranks
    if not case.need.parameters:
        return "no config given", None, ""
    fits = max(1, round(steps / ranks)) * ranks
    return f"{steps} over {ranks} ranks", steps % ranks == 0, f"set --gradient_accumulation_steps={fits}"
