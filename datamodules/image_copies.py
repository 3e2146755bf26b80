"""Copies of the images at the size that training reads, made once and read in their place.

Decoding a photograph of megapixels costs more than a small network's step on it; a copy costs a
read of `3 x size x size` bytes, and of the file itself once. A copy is kept under the photograph's
content, and holds the very bytes that resizing it gives, so training is the same with and without.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from rl4med_ddpo.datamodules.file_digests import FileDigests
from rl4med_ddpo.datamodules.images import Resize, read_image
from rl4med_ddpo.datamodules.tensor_folder import TensorFolder
from rl4med_ddpo.foundation.errors import UserError

Progress = Callable[[Iterable[tuple[bool, str]], int], Iterable[tuple[bool, str]]]


class ResizedCopies(Dataset[tuple[bool, str]]):
    """Copies of image files; a file that was replaced since is copied again.

    Args:
        root: Folder of the copies, which several experiments may share.
        size: Side in pixels.
        resize: See `datamodules.images.read_image`.
    """

    def __init__(self, root: Path, size: int, resize: Resize) -> None:
        self.folder = TensorFolder(root / f"{size}-{resize}")
        self.size = size
        self.resize: Resize = resize
        self.paths: list[Path] = []
        self.digests = FileDigests()

    def make(self, paths: list[Path], num_workers: int, progress: Progress) -> int:
        """Copy what has no sound copy yet, and return how many that were.

        May be interrupted and called again: a copy appears whole or not at all.

        Args:
            paths: Image files.
            num_workers: Processes that do it; 0 does it in this one.
            progress: Wraps the work, given the number of files, as tqdm does.
        """
        self.paths, made = paths, 0
        loader = DataLoader(self, batch_size=None, num_workers=num_workers)
        for path, (new, digest) in zip(paths, progress(loader, len(paths)), strict=True):
            self.digests.known[path] = digest
            made += new
        return made

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[bool, str]:
        """Make copy i unless there is a sound one; tell whether so, and the file's digest."""
        path = self.paths[i]
        digest = self.digests(path)
        if self._sound(digest):
            return False, digest
        image = read_image(path, self.size, self.resize)
        self.folder.write(digest, (image * 255).round().byte())
        return True, digest

    def has(self, path: Path) -> bool:
        """Tell whether there is a copy."""
        return self.digests(path) in self.folder

    def read(self, path: Path) -> Tensor:
        """Return what `read_image` would, `(3, size, size)` float32 in [0, 1]."""
        return self.folder.read(self.digests(path)).float() / 255

    def _sound(self, key: str) -> bool:
        try:
            copy = self.folder.read(key) if key in self.folder else None
        except UserError:
            return False
        return copy is not None and copy.shape == (3, self.size, self.size)
