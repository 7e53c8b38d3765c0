"""What the tools share in a terminal: options and tables."""

import argparse
import re
from collections.abc import Collection, Sequence


def make_parser(tool: str, usage: str) -> argparse.ArgumentParser:
    """--help prints the tool's docstring, whose examples come first, and then the options."""
    raw = argparse.RawDescriptionHelpFormatter
    name = f"python -m tools.{tool}"
    return argparse.ArgumentParser(name, argparse.SUPPRESS, usage, formatter_class=raw, allow_abbrev=False)


def underscored(argv: list[str]) -> list[str]:
    """The same arguments, with --gpu-memory as --gpu_memory."""
    return [re.sub("(?<=^--)[^=]+", lambda name: name[0].replace("-", "_"), argument) for argument in argv]


def align(rows: Sequence[Sequence[str]], left: Collection[str]) -> str:
    """A table whose first row has the titles; left: those of columns of text. Columns without a value are left out."""
    padded = []
    for column in zip(*rows, strict=True):
        justify = str.ljust if column[0] in left else str.rjust
        if any(column[1:]):
            padded.append([justify(text, max(map(len, column))) for text in column])
    return "\n".join("  ".join(line).rstrip() for line in zip(*padded, strict=True))
