"""The objective of DDPO: Eq. 2 with a clipped ratio, on (sample, step) pairs of a rollout."""

import torch
from torch import Tensor

from rl4med_ddpo.lightning_modules.diffusion.latent_diffusion import LatentDiffusion
from rl4med_ddpo.lightning_modules.diffusion.lora import without_lora
from rl4med_ddpo.lightning_modules.policy_gradient.loss import PolicyLoss, clipped_policy_loss
from rl4med_ddpo.lightning_modules.policy_gradient.rollout import Pairs, Rollout


class PolicyObjective:
    """The loss of pairs under the weights as they are now.

    Args:
        model: The policy that is trained.
        clip_range: How far the ratio may fall below 1, and rise above it.
        kl_weight: Weight, in the loss, of the divergence from the policy before training; wants
            adapters.
        guided: Whether the guided policy is trained, or its conditional half.
    """

    def __init__(
        self,
        model: LatentDiffusion,
        clip_range: tuple[float, float],
        kl_weight: float = 0.0,
        guided: bool = True,
    ) -> None:
        self.model, self.clip_range = model, clip_range
        self.kl_weight, self.guided = kl_weight, guided

    def __call__(self, rollout: Rollout, pairs: Pairs) -> PolicyLoss:
        """Evaluate the loss of some pairs, a value a pair."""
        latents, previous = rollout.transitions(pairs.row, pairs.step)
        text = self.model.embed([rollout.prompts[row] for row in pairs.row.tolist()])
        device = self.model.device
        step, advantage = pairs.step.to(device), pairs.advantage.to(device)
        noise = self.noise(latents, step, text)
        log_prob = self.model.schedule.log_prob(previous, latents, noise, step)
        old_log_prob = rollout.log_probs[pairs.row, pairs.step]
        result = clipped_policy_loss(log_prob, old_log_prob, advantage, self.clip_range)
        if not self.kl_weight:
            return result
        reference = self.reference_noise(latents, step, text)
        divergence = self.model.schedule.divergence(latents, noise, reference, step)
        return result.penalised(divergence, self.kl_weight)

    def noise(self, latents: Tensor, step: Tensor, text: Tensor) -> Tensor:
        """Predict the noise as the policy that is trained does.

        Args:
            latents: x_t, `(P, C, h, w)` float32.
            step: Index of the transition, `(P,)`.
            text: Prompt embeddings, `(P, L, D)`.
        """
        if not self.guided:
            return self.model.conditional_noise(latents, step, text)
        return self.model.guided_noise(latents, step, text, self.model.embed([""])[0])

    @torch.no_grad()
    def reference_noise(self, latents: Tensor, step: Tensor, text: Tensor) -> Tensor:
        """Predict the noise as the policy did before training: the U-Net without its adapters."""
        with without_lora(self.model.unet):
            return self.noise(latents, step, text)
