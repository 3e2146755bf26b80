"""How far a policy has come from the one before training."""

from collections.abc import Callable

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from rl4med_ddpo.lightning_modules.diffusion.latent_diffusion import LatentDiffusion


@torch.no_grad()
def divergence_from_start(
    model: LatentDiffusion,
    prompts: list[str],
    noise_keys: Tensor,
    load: Callable[[], UNet2DConditionModel],
) -> Tensor:
    """Return the KL divergence from the policy before training, over whole trajectories, `(n,)`.

    Summed over the steps, and averaged over the latents' dimensions as the log-density is.

    Args:
        model: The policy.
        prompts: n texts, at least one.
        noise_keys: `(n,)` int64.
        load: Reads the U-Net that training started from, if the full U-Net is trained.
    """
    transitions = list(model.trajectory(prompts, noise_keys))
    text = model.embed(prompts)
    total = torch.zeros(len(prompts), device=text.device)
    with model.before_training(load):
        for transition in transitions:
            step = torch.full((len(prompts),), transition.step, device=text.device)
            timestep = model.schedule.timesteps[step]
            reference = model.predict_noise(transition.latents, timestep, text)
            total += model.schedule.divergence(
                transition.latents, transition.noise, reference, step
            )
    return total
