"""What a user did wrong: one short message (value, rule, fix) and exit status 2, never a traceback."""


class UserError(ValueError):
    """Ends the program with its text and status 2; raise it on every rank (see Ranks.together) or on none."""


class ConfigError(UserError):
    """A setting that cannot be; its text lists every problem found, not only the first."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, or of another model."""
