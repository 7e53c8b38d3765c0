"""Fuzzing for a given time: cases made by Hypothesis, and the smallest one that fails at each place of the code.

Hypothesis has no budget of time, so `fuzz` runs it in batches, each with a seed of its own, until the time is over.
"""

import contextlib
import io
import json
import resource
import signal
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hypothesis
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir

from data.errors import DataError
from tests.running import ROOT
from training.distributed import describe_error
from training.errors import UserError

BATCH = 100  # cases
HANG_SECONDS = 20
MORE_MEMORY = 3 * 2**30  # bytes; a case that needs more fails
set_hypothesis_home_dir(Path(tempfile.gettempdir(), "hypothesis"))  # its caches; not in the repository
ODD_NUMBERS = [0, -1, 2**31, 2**63, 2**64, 10**18, 1e300, -0.0, float("nan"), float("inf"), True]
ODD_TEXTS = ["", "auto", "cpu", "nvme", "resume", "zero2", "fsdp", "\0", "../..", "/dev/null", "é", "\ud800", "x" * 300]
ODD_BYTES = [b"\0", b"\xff", b"\xef\xbb\xbf", b"\n", b"{", b"[" * 3000, b'{"a":' * 3000, b'"\\ud800"', b"9" * 5000]


@dataclass(frozen=True)
class Case:
    """A file's content; `made`: how it was made, for people."""

    made: str
    content: bytes

    def __repr__(self) -> str:
        return self.made


@dataclass
class Tally:
    """failures: by exception and place in the code, the smallest case and the exception's text."""

    counts: Counter[str] = field(default_factory=Counter)  # cases, used, refused
    failures: dict[str, tuple[str, str]] = field(default_factory=dict)

    def fail(self, place: str, case: str, text: str) -> None:
        self.failures[place] = min(self.failures.get(place, (case, text)), (case, text), key=lambda pair: len(pair[0]))

    def report(self) -> str:
        shown = [f"{place}: {text[:300]}\n    {case[:600]}" for place, (case, text) in self.failures.items()]
        return "\n".join([f"{len(shown)} places that fail:", *shown])


class TimeIsOver(BaseException):
    """No Exception, so that Hypothesis does not take it for a failure."""


class Hang(Exception):
    """A case took more than HANG_SECONDS."""


def fuzz(strategy: st.SearchStrategy, read: Callable[[Any], object], seconds: float, seed: int) -> Tally:
    """Read cases until the time is over, one batch at least. Each must be used, or refused by an error for users."""
    tally, known, start = Tally(), set[str](), 0.0

    def read_one(case: Any) -> None:
        nonlocal start
        start = start or time.monotonic()  # Hypothesis takes seconds before its first case
        if time.monotonic() > start + seconds and tally.counts["cases"] >= BATCH:
            raise TimeIsOver
        try:
            outcome = use_or_refuse(read, case)
        except Exception as error:
            tally.counts["cases"] += 1
            place = place_of(error)
            tally.fail(place, repr(case), f"{type(error).__name__}: {error}")
            if place not in known:
                raise
        else:
            tally.counts.update(["cases", outcome])

    options = hypothesis.settings(
        max_examples=BATCH,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    with contextlib.suppress(TimeIsOver):
        while True:
            try:
                options(hypothesis.seed(seed)(hypothesis.given(strategy)(read_one)))()
            except Exception:
                if tally.failures.keys() <= known:
                    raise  # not of a case: Hypothesis has something to say
                known |= tally.failures.keys()
            seed += 1
    return tally


def use_or_refuse(read: Callable[[Any], object], case: Any) -> str:
    """ "used" or "refused"; raises what is neither."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), limits():
        try:
            read(case)
        except (UserError, DataError, OSError) as error:
            describe_error(error)  # or it is a bug
            return "refused"
        except SystemExit as end:
            assert end.code in (0, 2), f"exit status {end.code}"
            return "refused" if end.code else "used"
    return "used"


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """A case may neither hang nor fill the memory."""

    def stop(*_: Any) -> None:
        raise Hang(f"longer than {HANG_SECONDS} s")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    old_limit, old_handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MORE_MEMORY, old_limit[1]))
    signal.alarm(HANG_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old_handler)
        resource.setrlimit(resource.RLIMIT_AS, old_limit)


def place_of(error: BaseException) -> str:
    """The exception's class, and the innermost line of this repository that it went through."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(f"{ROOT}/")]
    own = [frame for frame in frames if "/tests/" not in frame.filename] or frames
    return f"{type(error).__name__} at {own[-1].filename.removeprefix(f'{ROOT}/')}:{own[-1].lineno} ({own[-1].name})"


# Strategies of Hypothesis

scalars = st.one_of(
    *(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=10)),
    *(st.sampled_from(ODD_NUMBERS), st.sampled_from(ODD_TEXTS)),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


@st.composite
def damaged(draw: Any, file: Case) -> Case:
    """Bytes with up to three changes, as disks, copying and editors make them."""
    content, changes = file.content, []
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, len(content)))
        end = min(len(content), start + draw(st.sampled_from([0, 1, 2, 8, 100, 10**9])))
        kind = draw(st.sampled_from(["flip", "remove", "repeat", "zero", "insert"]))
        if kind == "flip":
            bit, end = draw(st.integers(0, 7)), start + 1
            new, kind = bytes(byte ^ (1 << bit) for byte in content[start:end]), f"flip bit {bit} of"
        elif kind == "insert":
            new, end = draw(st.sampled_from(ODD_BYTES) | st.binary(max_size=8)), start
            kind = f"insert {len(new)} bytes {new[:12]!r} at"
        else:
            new = {"remove": b"", "repeat": 2 * content[start:end], "zero": bytes(end - start)}[kind]
        changes.append(f"{kind} {start}:{end}")
        content = content[:start] + new + content[end:]
    return Case(f"{file}: {', '.join(changes) or 'as it is'}", content)


def places(tree: Any, path: str = "") -> Iterator[tuple[Any, Any, str]]:
    """(container, key, path) of everything in a JSON."""
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ():
        yield tree, key, f"{path}.{key}"
        yield from places(tree[key], f"{path}.{key}")


@st.composite
def edited(draw: Any, file: Case, keys: tuple[str, ...] = ("a",), fix: Callable = json.dumps) -> Case:
    """A JSON with up to three changes, as people and other programs make them. keys: to add; fix: makes it text."""
    box, changes = {"": json.loads(file.content)}, []
    for _ in range(draw(st.integers(0, 3))):
        container, key, path = draw(st.sampled_from(list(places(box))))
        kind, value = draw(st.sampled_from(["replace", "remove", "add"])), draw(values)
        if kind == "add" and isinstance(container[key], dict):
            added = draw(st.sampled_from(keys) | st.text(max_size=5))
            container[key][added] = value
            changes.append(f"{path[1:]}.{added} := {value!r}")
        elif kind == "remove" and isinstance(container, dict) and key:
            del container[key]
            changes.append(f"remove {path[1:]}")
        else:
            container[key] = value
            changes.append(f"{path[1:] or 'the file'} = {value!r}")
    return Case(f"{file}: {', '.join(changes) or 'as it is'}", fix(box[""]).encode())


def json_files(
    seeds: dict[str, Any], keys: tuple[str, ...] = ("a",), fix: Callable = json.dumps
) -> st.SearchStrategy[Case]:
    """JSON files with changes in their content, or in their bytes."""
    files = [Case(name, json.dumps(tree).encode() + b"\n") for name, tree in seeds.items()]
    return st.one_of(*(edited(file, keys, fix) for file in files), *(damaged(file) for file in files))


def texts_of(line: st.SearchStrategy[str]) -> st.SearchStrategy[Case]:
    """Files of such lines, of any text, and of any bytes."""
    texts = st.lists(line, max_size=4).map("\n".join) | st.text(max_size=40)
    files = texts.map(lambda text: text.encode(errors="surrogatepass")) | st.binary(max_size=40)
    return files.map(lambda content: Case(repr(content), content))
