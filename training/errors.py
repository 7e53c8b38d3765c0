"""What a user did wrong: one short message (value, rule, fix) and exit status 2, never a traceback.

Other ends of a run have a status of their own, for schedulers and supervisors.
"""

STOPPED = 75  # on request, with everything saved: the same command with --resume=auto goes on (sysexits.h: EX_TEMPFAIL)
HUNG = 76  # the watchdog ended it
LOST = 77  # another rank went away: that one is the cause


def listed(problems: list[str], where: str) -> str:
    """The text of an error that names every problem, one a line; where: "in the settings"."""
    return "\n  ".join([f"{len(problems)} problem{'s' * (len(problems) != 1)} {where}", *problems])


class UserError(ValueError):
    """Ends the program with its text and status 2; raise it on every rank (see Ranks.together) or on none."""


class ConfigError(UserError):
    """A setting that cannot be; its text lists every problem found, not only the first."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, or of another model."""


class NodeError(UserError):
    """One that a node's ranks have for themselves: told by the first of each node."""


class RankError(UserError):
    """One that a single rank has: told by that rank, if there is a text; the launcher ends the others."""


class Stopped(Exception):
    """The run was asked to stop, and did: raised on every rank at the same step, after the checkpoint was written."""
