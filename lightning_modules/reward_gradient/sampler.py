"""Sampling that a loss on the images is differentiated through."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rl4med_ddpo.foundation.progress import progress
from rl4med_ddpo.foundation.randomness import generator
from rl4med_ddpo.lightning_modules.diffusion.latent_diffusion import LatentDiffusion


class Draws(NamedTuple):
    """Samples, differentiable by the U-Net's weights.

    Attributes:
        latents: x_0, `(B, C, h, w)`.
        change: Mean squared change of the noise prediction since before training, `(B,)`, each in
            one state of the sample's own; zeros if it is not asked for.
    """

    latents: Tensor
    change: Tensor


class DifferentiableSampler:
    """Draws the samples that `LatentDiffusion.trajectory` draws, with the gradient of x_0.

    The noise of each transition is a constant: x_{t-1} = mean(x_t) + sigma_t z. Of a step with a
    gradient only its state is kept, and its activations are computed again on the way back, so the
    memory does not grow with the number of steps but for the latents.

    The change of the noise prediction is measured in a state that is taken as given: as a part of
    the differentiated chain it would lead the chain to states where both networks agree.

    Args:
        model: What is trained.
        last_steps: Steps that the gradient goes back through, the last ones of the trajectory.
        start: Returns the U-Net before training, unless that is the U-Net without adapters; None
            measures no change.
    """

    def __init__(
        self,
        model: LatentDiffusion,
        last_steps: int,
        start: Callable[[], UNet2DConditionModel] | None,
    ) -> None:
        self.model, self.last_steps, self.start = model, last_steps, start

    def draw(self, prompts: list[str], noise_keys: Tensor) -> Draws:
        """Draw a sample for each prompt.

        Args:
            prompts: B texts.
            noise_keys: `(B,)` int64; sample i depends on (prompt i, key i) alone.
        """
        schedule, text = self.model.schedule, self.model.embed(prompts)
        generators = [generator(key) for key in noise_keys.tolist()]
        latents = self.model.initial_latents(generators)
        first = schedule.steps - self.last_steps
        states: list[Tensor] = []
        for step in range(schedule.steps):
            noise = schedule.noise(latents, generators)
            if step < first:
                with torch.no_grad():
                    latents = self.follow(latents, noise, step, text)
            else:
                states.append(latents.detach())
                latents = checkpoint(self.follow, latents, noise, step, text, use_reentrant=False)
            progress.report("sampling", step + 1, schedule.steps)
        change = latents.new_zeros(len(latents))
        if self.start is not None:
            draws = [torch.randint(self.last_steps, (), generator=g) for g in generators]
            chosen = torch.stack(draws)
            state = torch.stack(states)[chosen, torch.arange(len(chosen))]
            timestep = schedule.timesteps[(first + chosen).to(state.device)]
            change = self.change_since_start(state, timestep, text, self.start)
        return Draws(latents, change)

    def follow(self, latents: Tensor, noise: Tensor, step: int, text: Tensor) -> Tensor:
        """Take one transition, by noise that is given."""
        index = torch.full((len(latents),), step, device=latents.device)
        schedule = self.model.schedule
        predicted = self.model.predict_noise(latents, schedule.timesteps[index], text)
        return schedule.mean(latents, predicted, index) + schedule.sigma[step] * noise

    def change_since_start(
        self,
        latents: Tensor,
        timestep: Tensor,
        text: Tensor,
        start: Callable[[], UNet2DConditionModel],
    ) -> Tensor:
        """Return the mean squared change of the noise prediction in some states, `(B,)`."""
        with torch.no_grad(), self.model.before_training(start):
            before = self.model.predict_noise(latents, timestep, text)
        now = self.model.predict_noise(latents, timestep, text)
        return (now - before).square().mean(dim=(1, 2, 3))
