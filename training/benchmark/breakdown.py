"""Where a step's time goes, from a trace of torch.profiler: parts that add up to the step.

The main thread marks the step and, in it, forward and backward of each micro-step; what follows the last backward
(clipping, update, zeroing) is the optimizer's. On a GPU the device is waited for at each mark, so that the kernels of
a part lie within it. What is left of the step (reading batches, Python between the parts) is "other".

Communication: the time of collectives (gloo's operations, NCCL's kernels) in which nothing is computed, be it sending
or waiting for a slower rank; what runs beside kernels, or on a CPU beside aten operations of the main thread, costs no
time and is not counted. Offload: the same for copies between device and host, and for DeepSpeed's swapping to and from
NVMe; DeepSpeedCPUAdam's update counts as the optimizer's. Both are taken out of the part that they lie in. On CPU
ranks the host's memory is the device's: there is nothing to copy, and "offload" is NVMe only.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PARTS = ("forward", "backward", "communication", "optimizer", "offload", "other")
COLLECTIVES = ("gloo:", "nccl:", "c10d::")
Span = tuple[float, float]  # start and end, microseconds
Event = dict[str, Any]  # of Chrome's trace format: name, cat, ts, dur, tid


def union(spans: Iterable[Span]) -> list[Span]:
    """In order, none touching another."""
    joined: list[Span] = []
    for start, end in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((start, end))
    return joined


def within(spans: list[Span], others: list[Span]) -> list[Span]:
    """What two unions have in common."""
    common, a, b = [], 0, 0
    while a < len(spans) and b < len(others):
        start, end = max(spans[a][0], others[b][0]), min(spans[a][1], others[b][1])
        if start < end:
            common.append((start, end))
        if spans[a][1] < others[b][1]:
            a += 1
        else:
            b += 1
    return common


def without(spans: list[Span], others: list[Span]) -> list[Span]:
    """What of a union does not lie in the other."""
    ends = [float("-inf"), *(edge for span in others for edge in span), float("inf")]
    return within(spans, list(zip(ends[::2], ends[1::2], strict=True)))


def length(spans: Iterable[Span]) -> float:
    return sum(end - start for start, end in spans)


def events(trace: Path) -> list[Event]:
    """The complete events of a file that torch.profiler's export_chrome_trace wrote."""
    return [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("ph") == "X"]


def of_kind(event: Event, main: Any, on_gpu: bool) -> str:
    """compute, communication, offload, or nothing of these."""
    name, category = event["name"], event.get("cat")
    if name == "swap" or (category == "gpu_memcpy" and ("HtoD" in name or "DtoH" in name)):
        return "offload"
    if category in ("kernel", "gpu_memcpy", "gpu_memset"):
        return "communication" if "nccl" in name.lower() else "compute"
    if not on_gpu and name.startswith(COLLECTIVES):
        return "communication"
    return "compute" if not on_gpu and event["tid"] == main and name.startswith("aten::") else ""


def parts(found: list[Event]) -> list[dict[str, float]]:
    """Milliseconds of every one of PARTS in each step of the trace, which the marks "step" enclose."""
    spans: dict[str, list[Span]] = {"compute": [], "communication": [], "offload": []}
    marks: dict[str, list[Span]] = {"step": [], "forward": [], "backward": []}
    main = next(event["tid"] for event in found if event["name"] == "step")
    on_gpu = any(event.get("cat") == "kernel" for event in found)
    for event in found:
        span = event["ts"], event["ts"] + event["dur"]
        if event.get("cat") == "user_annotation" and event["name"] in marks:
            marks[event["name"]].append(span)
        elif kind := of_kind(event, main, on_gpu):
            spans[kind].append(span)
    compute, communication, offload = (union(spans[kind]) for kind in ("compute", "communication", "offload"))
    exposed = without(communication, compute)
    swapped = without(without(offload, compute), communication)
    return [of_step(step, marks, exposed, swapped) for step in sorted(marks["step"])]


def of_step(step: Span, marks: dict[str, list[Span]], exposed: list[Span], swapped: list[Span]) -> dict[str, float]:
    places = {name: within(union(marks[name]), [step]) for name in ("forward", "backward")}
    last = max((end for _, end in places["backward"]), default=step[1])
    places["optimizer"] = [(last, step[1])]
    ms = {name: length(without(without(place, exposed), swapped)) / 1e3 for name, place in places.items()}
    ms["communication"] = length(within(exposed, [step])) / 1e3
    ms["offload"] = length(within(swapped, union(span for place in places.values() for span in place))) / 1e3
    ms["other"] = (step[1] - step[0]) / 1e3 - sum(ms.values())
    return {name: ms[name] for name in PARTS}


def mean(steps: list[dict[str, float]]) -> dict[str, float]:
    """Of several steps, or of several ranks."""
    return {name: sum(step[name] for step in steps) / len(steps) for name in PARTS}
