"""Files named by what they hold, not by what they are called."""

from pathlib import Path

from rl4med_ddpo.foundation.errors import UserError
from rl4med_ddpo.foundation.hashes import key_of


class FileDigests:
    """Digests of the files' bytes; each file is read once a process.

    Attributes:
        known: What was read already, here or by a process that says so.
    """

    def __init__(self) -> None:
        self.known: dict[Path, str] = {}

    def __call__(self, path: Path) -> str:
        """Return a file's digest.

        Raises:
            UserError: if it cannot be read.
        """
        if path not in self.known:
            try:
                self.known[path] = key_of(path.read_bytes())
            except OSError as error:
                raise UserError(f"cannot read the image {path}: {error.strerror}.") from error
        return self.known[path]
