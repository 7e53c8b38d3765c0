"""The error of the data package, and what messages share: the hint at a misspelled name, and checks of parsed JSON."""

import difflib
import math
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any

JSON_TYPES = {dict: "an object", list: "a list", str: "a string", int: "an integer", float: "a number"}
JSON_TYPES |= {bool: "true or false", type(None): "null"}


class DataError(ValueError):
    """Something wrong with a data set or a text; the message gives the value, the rule and the fix."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean X?" with the known name closest to `name`, or "" if none is close."""
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {matches[0]}?" if matches else ""


def check_types(values: Any, types: Mapping[str, type | tuple[type, ...]]) -> list[str]:
    """The problems of parsed JSON that must be an object: one text per key that is missing or of another type."""
    if not isinstance(values, dict):
        return [f"must be {JSON_TYPES[dict]}, not {reprlib.repr(values)}"]
    problems = []
    for key, allowed in types.items():
        allowed = allowed if isinstance(allowed, tuple) else (allowed,)
        value = values.get(key)
        right = type(value) in allowed or (type(value) is int and float in allowed)  # true and false are no integers
        if key not in values:
            problems.append(f"{key!r} is missing")
        elif not right or (isinstance(value, float) and not math.isfinite(value)):
            problems.append(f"{key} = {reprlib.repr(value)}: must be {' or '.join(JSON_TYPES[t] for t in allowed)}")
    return problems
