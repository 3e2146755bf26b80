"""The one exception that speaks to the user, and the words that its messages share."""

from collections.abc import Iterable

_SHOWN = 3


class UserError(Exception):
    """Something the user gave cannot work: the message says what, what is allowed and what to do.

    The command line prints the message without a traceback and exits with code 2.
    """


def name_few(things: Iterable[object]) -> str:
    """Name the first three things and count the rest, for an error message."""
    things = list(things)
    shown = ", ".join(str(thing) for thing in things[:_SHOWN])
    rest = len(things) - _SHOWN
    return f"{shown} and {rest:,} more" if rest > 0 else shown
