"""What a stage needs from the stages before it, checked before any work starts."""

from pathlib import Path
from typing import NamedTuple

from rl4med_ddpo.foundation.errors import UserError


class Prerequisite(NamedTuple):
    """A file or folder that an earlier stage leaves, and the command that makes it."""

    path: str
    what: str
    command: str


def require(needs: list[Prerequisite]) -> None:
    """Check that everything needed is there.

    Raises:
        UserError: naming all that is missing at once, each with the command that makes it.
    """
    missing = [need for need in needs if not Path(need.path).exists()]
    if not missing:
        return
    lines = [f"  {n.path}\n      {n.what}, made by: {n.command}" for n in missing]
    raise UserError(
        f"{len(missing)} of the {len(needs)} things this stage starts from "
        f"{'is' if len(missing) == 1 else 'are'} missing:\n"
        + "\n".join(lines)
        + "\nTo watch every stage at a small size, with nothing prepared: make demo"
    )
