"""The policy of DDPO: DDIM's stochastic transition, its samples and its density.

Notation (Song et al. 2021, Eq. 12 and 16; RL4Med-DDPO, Eq. 1):

| symbol | here | meaning |
| --- | --- | --- |
| x_t, x_{t-1} | `latents`, `previous` | a state and the action taken in it |
| abar_t, abar_{t-1} | `alpha`, `alpha_previous` | cumulative products of 1 - beta |
| sigma_t | `sigma` | standard deviation of the transition; eta = 1 gives the ancestral sampler |
| e_theta | `noise` | the U-Net's (guided) noise prediction |

All tensors here are float32 whatever precision the U-Net runs in: a ratio of densities clipped at
1 +- 1e-4 has no room for rounding.
"""

import math
from typing import NamedTuple

import torch
from diffusers import DDIMScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from rl4med_ddpo.foundation.errors import UserError


class Transition(NamedTuple):
    """One denoising step of a batch.

    Attributes:
        step: Its index.
        latents: x_t, `(B, C, H, W)`.
        previous: x_{t-1}, `(B, C, H, W)`.
        log_prob: Of that action, `(B,)`.
        noise: The prediction that it was drawn by, `(B, C, H, W)`, a constant.
    """

    step: int
    latents: Tensor
    previous: Tensor
    log_prob: Tensor
    noise: Tensor


class DDIMSchedule(nn.Module):
    """Tables of the T transitions, indexed by step: 0 is the noisiest, T - 1 the last.

    The tables are non-persistent buffers, so they follow the module that owns them and stay out of
    its checkpoints.

    Args:
        scheduler: The pipeline's own scheduler; its configuration decides the noise schedule, the
            spacing of the timesteps and the last step's alpha.
        steps: Number of denoising steps T.
        eta: Share of the ancestral noise in each transition, in (0, 1].

    Raises:
        UserError: if the scheduler predicts something other than noise, clamps its samples, or a
            transition has no variance.
    """

    timesteps: Tensor
    alpha: Tensor
    alpha_previous: Tensor
    sigma: Tensor

    def __init__(self, scheduler: DDIMScheduler, steps: int, eta: float = 1.0) -> None:
        super().__init__()
        config = scheduler.config
        if config["prediction_type"] != "epsilon":
            raise UserError(
                f"the scheduler predicts {config['prediction_type']!r}; the policy is written for "
                "'epsilon' (noise prediction), as Stable Diffusion v1.5 does"
            )
        if config["clip_sample"] or config.get("thresholding"):
            raise UserError(
                "the scheduler clamps its prediction of x_0 (clip_sample or thresholding), which "
                "the density of a transition does not account for; set both to false in the "
                "pipeline's scheduler/scheduler_config.json"
            )
        most = config["num_train_timesteps"] - config["steps_offset"]
        if not 1 <= steps <= most:
            raise UserError(f"steps={steps}: allowed are 1 to {most}")
        if not 0 < eta <= 1:
            raise UserError(
                f"eta={eta}: allowed are (0, 1]; at 0 the transition is deterministic and has no "
                "density"
            )
        scheduler.set_timesteps(steps)
        timesteps = scheduler.timesteps.long()
        previous = timesteps - config["num_train_timesteps"] // steps
        alphas = scheduler.alphas_cumprod.double()
        alpha = alphas[timesteps]
        alpha_previous = torch.where(
            previous >= 0, alphas[previous.clamp(min=0)], scheduler.final_alpha_cumprod.double()
        )
        variance = (1 - alpha_previous) / (1 - alpha) * (1 - alpha / alpha_previous)
        sigma = eta * variance.clamp(min=0).sqrt()
        _require_density(sigma, timesteps)
        self.register_buffer("timesteps", timesteps, persistent=False)
        for name, table in (("alpha", alpha), ("alpha_previous", alpha_previous), ("sigma", sigma)):
            self.register_buffer(name, table.float(), persistent=False)

    def __len__(self) -> int:
        return len(self.timesteps)

    def mean(self, latents: Tensor, noise: Tensor, step: Tensor) -> Tensor:
        """Mean of p(x_{t-1} | x_t, c), DDIM Eq. 12.

        Args:
            latents: x_t, `(B, C, H, W)`.
            noise: Guided noise prediction, `(B, C, H, W)`.
            step: Index of each sample's transition, `(B,)` int64.
        """
        alpha, alpha_previous, sigma = (
            table[step].view(-1, 1, 1, 1) for table in (self.alpha, self.alpha_previous, self.sigma)
        )
        origin = (latents - (1 - alpha).sqrt() * noise) / alpha.sqrt()
        direction = (1 - alpha_previous - sigma**2).sqrt() * noise
        return alpha_previous.sqrt() * origin + direction

    def log_prob(self, previous: Tensor, latents: Tensor, noise: Tensor, step: Tensor) -> Tensor:
        """Log-density of the action x_{t-1}, *averaged* over C, H and W, `(B,)`.

        The average, not the sum, is what the published clip range of 1e-4 refers to.
        """
        sigma = self.sigma[step].view(-1, 1, 1, 1)
        mean = self.mean(latents, noise, step)
        log_density = (
            -((previous - mean) ** 2) / (2 * sigma**2) - sigma.log() - 0.5 * math.log(2 * math.pi)
        )
        return log_density.mean(dim=(1, 2, 3))

    def draw(
        self, latents: Tensor, noise: Tensor, step: int, generators: list[torch.Generator]
    ) -> Transition:
        """Draw the action of a batch from the policy.

        Args:
            latents: x_t, `(B, C, H, W)` float32.
            noise: Guided noise prediction, `(B, C, H, W)`; the log-prob is differentiable by it.
            step: Index of the transition, the same for all samples.
            generators: One CPU generator a sample, so that a sample does not depend on its batch.
        """
        index = torch.full((len(latents),), step, device=latents.device)
        draw = randn_tensor(latents.shape, generator=generators, device=torch.device("cpu"))
        constant = noise.detach()
        mean = self.mean(latents, constant, index)
        previous = mean + self.sigma[step] * draw.to(latents.device)
        log_prob = self.log_prob(previous, latents, noise, index)
        return Transition(step, latents, previous, log_prob, constant)

    def divergence(self, latents: Tensor, noise: Tensor, other: Tensor, step: Tensor) -> Tensor:
        """KL divergence of two policies' transitions, |mu - mu'|^2 / (2 sigma^2), `(B,)`.

        Both are normal with the same sigma. Averaged over C, H and W, as the log-density is.

        Args:
            latents: x_t, `(B, C, H, W)`.
            noise: What the one policy predicts, `(B, C, H, W)`.
            other: What the other predicts, `(B, C, H, W)`.
            step: Index of each sample's transition, `(B,)` int64.
        """
        apart = self.mean(latents, noise, step) - self.mean(latents, other, step)
        sigma = self.sigma[step].view(-1, 1, 1, 1)
        return (apart**2 / (2 * sigma**2)).mean(dim=(1, 2, 3))


def _require_density(sigma: Tensor, timesteps: Tensor) -> None:
    flat = (sigma <= 0).nonzero().flatten().tolist()
    if flat:
        raise UserError(
            f"the transition has no density at {len(flat)} of {len(sigma)} steps (timesteps "
            f"{timesteps[flat][:3].tolist()}), where sigma is 0. Use a scheduler with "
            "set_alpha_to_one: false, as Stable Diffusion v1.5 has"
        )


def initial_latents(shape: tuple[int, ...], generators: list[torch.Generator]) -> Tensor:
    """Draw x_T ~ N(0, I) on the CPU, `(B, *shape)`, one generator a sample."""
    return randn_tensor((len(generators), *shape), generator=generators, device=torch.device("cpu"))
