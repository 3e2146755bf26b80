import os
import warnings
from pathlib import Path

import pytest
import torch

from rl4med_ddpo.base_pipeline.build import build_pipeline
from rl4med_ddpo.datamodules.dermoscopy import DermoscopyFolder
from rl4med_ddpo.lightning_modules.pipelines.load import save_pipeline
from support.dermoscopy import ARTIFACTS, ATTRIBUTES
from support.tiny import TINY_NETWORKS, fitted

# tiny networks: a second thread costs more than it computes, here and in subprocesses
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
# pytest's own arguments are not the command line's
warnings.filterwarnings("ignore", "LightningCLI's args parameter is intended")


def _real_data(name):
    folder = Path(os.environ.get("ISIC_TEST_DATA", "")) / name
    if "ISIC_TEST_DATA" not in os.environ or not folder.is_dir():
        pytest.skip(f"needs ISIC 2019: set ISIC_TEST_DATA to a folder with {name} in it")
    return folder


@pytest.fixture(scope="session")
def annotations_folder():
    """The full tables of ISIC 2019 and the authors' split files, without images."""
    return _real_data("isic-annotations")


@pytest.fixture(scope="session")
def real_folder():
    """1,240 true images in the official layout."""
    return _real_data("isic-real")


@pytest.fixture(scope="session")
def isic(tmp_path_factory):
    """Sixty-four images of 16 x 16 pixels: 45 to train, 9 to validate, 10 to test."""
    root = tmp_path_factory.mktemp("isic") / "data"
    DermoscopyFolder(root, images=64, size=16, combinations="balanced").write()
    return root


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory):
    """A Stable Diffusion pipeline of untrained networks: 16 x 16 images, 4 x 8 x 8 latents."""
    folder = tmp_path_factory.mktemp("pipeline") / "tiny"
    save_pipeline(build_pipeline(**TINY_NETWORKS), folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_classifiers(tmp_path_factory):
    """Checkpoints of a reward network and of a judge: different networks, seeds and steps."""
    folder = tmp_path_factory.mktemp("classifiers")
    return {
        "reward": fitted(folder / "reward.ckpt", "test_efficientnet", ATTRIBUTES, seed=1),
        "judge": fitted(folder / "judge.ckpt", "test_resnet", ARTIFACTS, seed=2),
    }
