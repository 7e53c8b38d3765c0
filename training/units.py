"""Bytes and rates, as people write them: to words, and from words."""

import re

from training.errors import UserError

PREFIXES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
SIZE = re.compile(r"([\d.]+(?:e\d+)?)\s*([kmgt]?)(i?)b?", re.I)
RATE = re.compile(r"(?:(\d+)\s*x\s*)?([\d.]+(?:e\d+)?)\s*([kmgt]?)(bits?|b)(?:/s|ps)?", re.I)


def gigabytes(count: float, digits: int | None = None) -> str:
    """digits: behind the point; without them as many as the size needs."""
    digits = (1 if count >= 1e8 else 4) if digits is None else digits
    return f"{count / 1e9:,.{digits}f} GB"


def size(text: str) -> float:
    """Bytes: 80GB, 80GiB, 512M, 1.5e9. UserError where it is none."""
    found = SIZE.fullmatch(text.strip())
    if not found or not number(found[1]):
        raise UserError(f"{text!r}: must be a size above 0, such as 80GB")
    prefix = found[2].lower()
    return number(found[1]) * (2.0 ** (10 * "kmgt".index(prefix) + 10) if found[3] and prefix else PREFIXES[prefix])


def rate(text: str) -> float:
    """Bytes a second: 400Gb is in bits, 50GB in bytes; 8x400Gb is eight of it. UserError where it is none."""
    found = RATE.fullmatch(text.strip())
    if not found or not number(found[2]):
        raise UserError(f"{text!r}: must be a rate above 0: 400Gb (bits a second), 50GB (bytes), 8x400Gb")
    bits = found[4] != "B"
    return int(found[1] or 1) * number(found[2]) * PREFIXES[found[3].lower()] / (8 if bits else 1)


def share(text: str) -> float:
    if not 0 < number(text) <= 1:
        raise UserError(f"{text!r}: is a share, above 0 and at most 1")
    return number(text)


def amount(text: str) -> float:
    if not (0 < number(text) < 1e30 or text.strip("0.") == ""):
        raise UserError(f"{text!r}: must be a number, not negative")
    return number(text)


def number(text: str) -> float:
    """0 where it is none."""
    try:
        return float(text)
    except ValueError:
        return 0.0
