"""Settings: a frozen, typed dataclass filled from config files and --key=value, the later one winning.

A config file is plain assignments under nanoGPT's names; nanoGPT's own files run unchanged. All that is wrong is
found before anything starts and told at once.
"""

import ast
import dataclasses
import difflib
import math
import runpy
import sys
import textwrap
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from training.errors import ConfigError, listed

Problem = tuple[str, str]  # key, the rule it breaks and the fix
T = TypeVar("T")

FSDP = ("strategy", "reshard_after_forward", "shard_ranks", "cpu_offload")  # the first turns the others on
# Keys of one script that are easily given to the other.
ELSEWHERE = {
    "deepspeed_config": "train_deepspeed.py and ./launch_deepspeed_*.sh",
    **dict.fromkeys(FSDP, "train.py and ./launch_fsdp.sh"),
}


def key(default: Any, meaning: str, section: str = "") -> Any:
    """A field: its only default, one line of meaning, and the section of --help that it opens."""
    return dataclasses.field(default=default, metadata={"meaning": meaning, "section": section})


def parse(cls: type[T], argv: list[str], usage: str) -> T:
    """argv (config files and --key=value, in order) -> cls; prints --help and exits 0 where asked.

    Raises ConfigError with every problem: unknown keys, wrong types, and what cls.problems() finds.
    """
    if "-h" in argv or "--help" in argv:
        print(help_text(cls, usage))
        sys.exit(0)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values: dict[str, Any] = {name: f.default for name, f in fields.items()}
    origin: dict[str, str] = {}
    problems: list[str] = []
    bad: set[str] = set()
    for name, value, where in read_all(argv, values, problems):
        try:
            values[name] = convert(name, value, fields)
            origin[name] = where
        except ConfigError as error:
            bad.add(name)
            problems.append(f"{name} = {value!r} ({where}): {error}")
    settings = cls(**values)
    for name, rule in settings.problems():  # type: ignore[attr-defined]
        if name not in bad:
            problems.append(f"{name} = {values[name]!r} ({origin.get(name, 'default')}): {rule}")
    if problems:
        raise ConfigError(listed(problems, "in the settings"))
    return settings


def read_all(argv: list[str], values: dict, problems: list[str]) -> Iterator[tuple[str, Any, str]]:
    """Yield (key, value, where) of every argument in order; what cannot be read goes to problems."""
    for argument in argv:
        if argument.startswith("-"):
            name, equals, value = argument.lstrip("-").partition("=")
            if equals or isinstance(values.get(name), bool):  # --benchmark is short for --benchmark=True
                yield name, Text(value if equals else "True"), "command line"
            else:
                problems.append(f"{argument} (command line): has no value; write --{name}=VALUE")
        else:
            try:
                yield from read_file(Path(argument), values)
            except ConfigError as error:
                problems.append(str(error))


class Text(str):
    """A value from the command line: text, to be read as the key's type."""


def read_file(path: Path, values: dict) -> Iterator[tuple[str, Any, str]]:
    """Run a config file, which sees the values set before it, and yield what it assigns."""
    if not path.is_file():
        known = sorted(str(p) for p in path.parent.glob("*.py"))
        near = [f"--{path}"] if "=" in path.name else difflib.get_close_matches(str(path), known, n=1)
        raise ConfigError(f"{path}: no such config file" + (f"; did you mean {near[0]}?" if near else ""))
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        result = runpy.run_path(str(path), init_globals=dict(values))
    except SyntaxError as error:  # in this file, or in one that it imports
        raise ConfigError(f"{place(error.filename or path, error.lineno)}: {error.msg}") from None
    except (Exception, SystemExit) as error:  # whatever a config file can raise is the user's to mend
        own = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        raise ConfigError(f"{place(path, own[-1] if own else None)}: {type(error).__name__}: {error}") from None
    lines = {n.id: n.lineno for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    for name, value in result.items():
        assigned = name in lines or (name in values and value is not values[name])
        if assigned and not name.startswith("_") and (name in values or not callable(value)):
            yield name, value, f"{path}:{lines.get(name, 1)}"


def place(path: Path | str, line: int | None) -> str:
    return f"{path}:{line}" if line else f"{path}"


def convert(name: str, value: Any, fields: dict[str, dataclasses.Field]) -> Any:
    """value as the type of the key; ConfigError (without key and value) where it is not."""
    if name not in fields:
        near = difflib.get_close_matches(name, fields, n=1)
        hint = f"did you mean {near[0]}?" if near else "--help lists all; a helper variable starts with _"
        if name in ELSEWHERE:
            hint = f"it belongs to {ELSEWHERE[name]}"
        raise ConfigError(f"unknown key; {hint}")
    kind = type(fields[name].default)
    if isinstance(value, Text):
        value = read_text(value, kind)
    if kind is float and type(value) is int:
        value = float(value) if abs(value) < 2**1000 else math.inf
    if type(value) is not kind:
        example = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}[kind]
        raise ConfigError(f"must be {example} ({kind.__name__})")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError("must be a finite number")
    return value


def read_text(text: str, kind: type) -> Any:
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    try:
        return kind(text)
    except ValueError:
        return text


def help_text(cls: type, usage: str) -> str:
    lines = [textwrap.dedent(usage).strip(), ""]
    for f in dataclasses.fields(cls):
        if f.metadata["section"]:
            lines += ["", f"{f.metadata['section']}:"]
        default = f"{f.default!r}".replace("'", "")
        kind = type(f.default).__name__
        head = f"  --{f.name}".ljust(32) + kind.ljust(7) + default.ljust(18)
        lines += textwrap.wrap(head + f.metadata["meaning"], 118, subsequent_indent=" " * 57)
    return "\n".join(lines)
