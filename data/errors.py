"""The error of the data package, and the hint that every "unknown name" message shares."""

import difflib
from collections.abc import Iterable
from typing import Any


class DataError(ValueError):
    """Something wrong with a data set or a text; the message gives the value, the rule and the fix."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean X?" with the known name closest to `name`, or "" if none is close."""
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {matches[0]}?" if matches else ""


def check_types(values: Any, types: dict[str, Any]) -> list[str]:
    """A text for each key of `types` that is missing in a JSON object, or has a value of another type."""
    if not isinstance(values, dict):
        return ["must be an object, {...}"]
    problems = []
    for name, kinds in types.items():
        kinds = kinds if isinstance(kinds, tuple) else (kinds,)
        if type(values.get(name)) not in kinds:
            names = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
            problems.append(f"{name} = {values.get(name)!r}: must be {names}")
    return problems
