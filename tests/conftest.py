import os
import warnings

import pytest
import torch
from tiny import fitted

from assets.build import build_pipeline
from datamodules.attributes import ARTIFACTS, ATTRIBUTES
from lightning_modules.pipelines import save_pipeline

# tiny networks: a second thread costs more than it computes, here and in subprocesses
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
# pytest's own arguments are not the command line's
warnings.filterwarnings("ignore", "LightningCLI's args parameter is intended")


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory):
    """A Stable Diffusion pipeline of untrained networks: 16 x 16 images, 4 x 8 x 8 latents."""
    folder = tmp_path_factory.mktemp("pipeline") / "tiny"
    pipeline = build_pipeline(
        seed=0,
        image_size=16,
        vae_channels=(8, 16),
        latent_channels=4,
        unet_channels=(16, 32),
        text_width=16,
    )
    save_pipeline(pipeline, folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_classifiers(tmp_path_factory):
    """Checkpoints of a reward network and of a judge: different networks, seeds and steps."""
    folder = tmp_path_factory.mktemp("classifiers")
    return {
        "reward": fitted(folder / "reward.ckpt", "test_efficientnet", ATTRIBUTES, seed=1),
        "judge": fitted(folder / "judge.ckpt", "test_resnet", ARTIFACTS, seed=2),
    }
