import pytest

from rl4med_ddpo.datamodules.dermoscopy import DermoscopyFolder


@pytest.fixture(scope="module")
def isic(tmp_path_factory):
    """A small ISIC folder, each combination in it."""
    root = tmp_path_factory.mktemp("isic") / "data"
    DermoscopyFolder(root, images=24, size=16, combinations="balanced").write()
    return root
