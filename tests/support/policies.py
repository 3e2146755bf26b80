"""A module that generates as DDPO does, without networks."""

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader

from rl4med_ddpo.foundation.progress import progress


class Policy(L.LightningModule):
    """Image i is a plain grey of brightness `weight`, marked by its key in the first pixel."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.weight = nn.Parameter(torch.zeros(()))
        self.asked = []

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)

    def training_step(self, batch, batch_idx):
        for t in range(5):
            progress.report("rollout", t + 1, 5)
        for k in range(2):
            progress.report("update", k + 1, 2)
        self.optimizers().step()
        with torch.no_grad():
            self.weight += 0.1
        self.log("reward/mean", 0.25, prog_bar=True)

    def test_step(self, batch, batch_idx):
        progress.report("sampling", 1, 1)

    def generate(self, prompts, noise_keys):
        self.asked.append((prompts, noise_keys.tolist()))
        images = torch.ones(len(prompts), 3, 32, 32) * self.weight
        images[:, :, 0, 0] = (noise_keys % 256 / 255)[:, None]
        return images


class RewardedPolicy(Policy):
    def reward_of(self, images, conditions):
        return conditions.sum(dim=1) / 6


def loader():
    return DataLoader(torch.zeros(1, 1))
