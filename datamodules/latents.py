"""Latents of the images, made once and read in every later epoch in place of the images."""

from pathlib import Path

from torch import Tensor

from rl4med_ddpo.datamodules.file_digests import FileDigests
from rl4med_ddpo.datamodules.tensor_folder import TensorFolder
from rl4med_ddpo.foundation.hashes import key_of

Flips = tuple[bool, bool]
"""Left-right, up-down."""

EVERY_FLIP: tuple[Flips, ...] = ((False, False), (True, False), (False, True), (True, True))


class LatentCache:
    """What an autoencoder makes of image files, under a key of the files' bytes and the flips.

    The latent of a flipped image is not the flipped latent, so each flip has an entry of its own.
    Another file under the same name, another size, or another autoencoder is another key.

    Args:
        root: Folder of the cache, which several experiments may share.
        settings: Everything else that decides a latent: the autoencoder's weights, the image's
            size, the precision.
    """

    def __init__(self, root: Path, *settings: object) -> None:
        self.folder = TensorFolder(root / f"latents-{key_of(*settings)}")
        self.digests = FileDigests()

    def key(self, path: Path, flips: Flips) -> str:
        """Return the key of an image file that is flipped; reads the file once a process."""
        return key_of(self.digests(path), *flips)

    def has(self, path: Path, flips: Flips) -> bool:
        """Tell whether the latent is there."""
        return self.key(path, flips) in self.folder

    def read(self, path: Path, flips: Flips) -> Tensor:
        """Return mean and standard deviation of the posterior, `(2C, h, w)` float32."""
        return self.folder.read(self.key(path, flips))

    def write(self, path: Path, flips: Flips, distribution: Tensor) -> None:
        """Keep mean and standard deviation of the posterior, `(2C, h, w)`."""
        self.folder.write(self.key(path, flips), distribution.float())
