"""The sampling half of Algorithm 1: draw images from the policy, score them, keep their states."""

from dataclasses import replace

import torch
from torch import Tensor

from rl4med_ddpo.foundation.progress import progress
from rl4med_ddpo.foundation.randomness import keys
from rl4med_ddpo.lightning_modules.diffusion.ddim import Transition
from rl4med_ddpo.lightning_modules.diffusion.latent_diffusion import LatentDiffusion
from rl4med_ddpo.lightning_modules.policy_gradient.rollout import Rollout, empty_rollout
from rl4med_ddpo.lightning_modules.rewards.base import Reward, joined
from rl4med_ddpo.lightning_modules.rewards.diversity import layout


class RolloutSampler:
    """Draws this process's samples of an epoch.

    Args:
        model: The policy.
        reward: Scores each batch of images when it is drawn, so that no more images are in memory
            than its own.
        seed: Decides the noise together with the epoch and the samples' global indices.
        batch: Images sampled at a time.
        on_host: Keep the trajectories in the host's memory.
    """

    def __init__(
        self, model: LatentDiffusion, reward: Reward, seed: int, batch: int, on_host: bool
    ) -> None:
        self.model, self.reward = model, reward
        self.seed, self.batch, self.on_host = seed, batch, on_host
        self.epoch = 0

    @torch.no_grad()
    def collect(self, index: Tensor, prompts: list[str], conditions: Tensor, epoch: int) -> Rollout:
        """Draw samples with their intermediate states (Algorithm 1, line 4), and score them.

        Args:
            index: Global sample indices, `(n,)` int64.
            prompts: n texts.
            conditions: What each asks for, multi-hot `(n, A)`, on the device.
            epoch: Decides the noise too.
        """
        self.epoch = epoch
        shape = (len(self.model.schedule) + 1, *self.model.latent_shape)
        rollout = empty_rollout(index, prompts, conditions, shape, self.on_host)
        scored, appearance = [], []
        for first in range(0, len(index), self.batch):
            rows = slice(first, first + self.batch)
            images = self.model.decode(self.sample_batch(rollout, rows))
            scored.append(self.reward(images, conditions[rows]))
            appearance.append(layout(images))
        return replace(rollout, scored=joined(scored), appearance=torch.cat(appearance))

    def sample_batch(self, rollout: Rollout, rows: slice) -> Tensor:
        """Sample some rows from x_T to x_0, keep every state, and return x_0, `(B, C, h, w)`."""
        noise_keys = keys(self.seed, "rollout", self.epoch, rollout.index[rows])
        done, total = rows.start * len(self.model.schedule), rollout.log_probs.numel()
        latents = torch.empty(0)
        for transition in self.model.trajectory(rollout.prompts[rows], noise_keys):
            latents = rollout.keep(rows, transition)
            done += len(latents)
            progress.report("rollout", done, total)
            self.after_step(transition, rows)
        return latents

    def after_step(self, transition: Transition, rows: slice) -> None:
        """Do nothing more; a sampler that takes gradients on the way overrides this."""
