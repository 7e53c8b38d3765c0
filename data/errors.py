class DataError(ValueError):
    """What is wrong with a data set or a text; the message gives the value, the rule and the fix."""
