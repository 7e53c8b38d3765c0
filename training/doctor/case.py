"""A host before the doctor: what is known of it, and the form of what is found."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from training import hosts
from training.doctor.needs import Need
from training.hostfile import Host

# The value found; whether it is well, red (False) or of no concern here (None); the fix.
Verdict = tuple[str, bool | None, str]
NOT_NEEDED: Verdict = ("not needed", None, "")


@dataclass(frozen=True)
class Finding:
    check: str
    host: str
    value: str
    ok: bool | None
    fix: str = ""


@dataclass(frozen=True)
class Case:
    """A host: its facts, the first host that answers and its facts, and the needs of the whole run."""

    host: Host
    facts: Mapping[str, Any]
    first: str
    facts_of_first: Mapping[str, Any]
    need: Need

    @property
    def ranks(self) -> int:
        return len(self.host.slots)

    def differs(self, what: str) -> str:
        """In words, with the fix behind a semicolon; nothing where it is as on the first host."""
        here, there = self.facts[what], self.facts_of_first[what]
        return "" if here == there else hosts.difference(what, there, here, self.first)

    @property
    def on_gpus(self) -> bool:
        return bool(self.facts["gpus"]) and self.need.cfg.device in ("auto", "cuda")


def red(text: str) -> Verdict:
    """From "value; fix" in one text."""
    value, _, fix = text.partition("; ")
    return value, False, fix


Rule = Callable[[Case], Verdict]
