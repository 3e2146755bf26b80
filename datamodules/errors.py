"""The one exception that speaks to the user."""


class UserError(Exception):
    """Something the user gave cannot work: the message says what, what is allowed and what to do.

    `run.py` prints the message without a traceback and ends with exit code 2.
    """
