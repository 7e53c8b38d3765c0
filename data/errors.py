"""The error of the data package, and the hint that every "unknown name" message shares."""

import difflib
from collections.abc import Iterable


class DataError(ValueError):
    """Something wrong with a data set or a text; the message gives the value, the rule and the fix."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean X?" with the known name closest to `name`, or "" if none is close."""
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {matches[0]}?" if matches else ""
