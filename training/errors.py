"""Errors that a user can fix, and the exit statuses of a run, for schedulers and supervisors."""

USER_ERROR = 2
STOPPED = 75  # stopped on request, everything saved: rerun with --resume=auto (EX_TEMPFAIL of sysexits.h)
HUNG = 76  # ended by the watchdog
LOST = 77  # another rank went away; that rank's error is the cause


def count(number: int, noun: str) -> str:
    """ "1 rank", "2 ranks"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def list_problems(problems: list[str], where: str) -> str:
    """The text of an error with one problem per line; where: "in the settings"."""
    return "\n  ".join([f"{count(len(problems), 'problem')} {where}", *problems])


class UserError(ValueError):
    """Ends the program with its text: value, rule, fix. Raise it on every rank (see Ranks.together) or on none."""


class ConfigError(UserError):
    """An invalid setting; the text lists every problem, not only the first."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, or of another model."""


class NodeError(UserError):
    """An error of a whole node: reported by the first rank of each node."""


class RankError(UserError):
    """An error of one rank, reported by that rank if it has a text; the launcher ends the others."""


class Stopped(Exception):
    """The run was asked to stop. Raised on every rank at the same step, after the checkpoint was written."""
