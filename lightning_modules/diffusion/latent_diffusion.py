"""The policy of DDPO: a latent diffusion model that is sampled by DDIM's stochastic transition.

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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn
from transformers import CLIPTextModel

from rl4med_ddpo.datamodules.tensor_folder import TensorFolder
from rl4med_ddpo.foundation.errors import UserError
from rl4med_ddpo.foundation.hashes import key_of
from rl4med_ddpo.foundation.randomness import generator
from rl4med_ddpo.lightning_modules.diffusion.lora import has_lora, without_lora
from rl4med_ddpo.lightning_modules.networks.frozen import Frozen, omit_frozen
from rl4med_ddpo.lightning_modules.pipelines.source import WITHOUT_SAFETY_CHECKER


class Transition(NamedTuple):
    """One denoising step of a batch.

    Attributes:
        step: Its index.
        latents: x_t, `(B, C, H, W)`.
        previous: x_{t-1}, `(B, C, H, W)`.
        log_prob: Of that action, `(B,)`; 0 where the transition is deterministic.
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
        noisy: First transition that draws noise, and the first after; the others are
            deterministic, eta 0. None draws noise in all.

    Raises:
        UserError: if the scheduler predicts something other than noise, clamps its samples, or a
            transition has no variance.
    """

    timesteps: Tensor
    alpha: Tensor
    alpha_previous: Tensor
    sigma: Tensor

    def __init__(
        self,
        scheduler: DDIMScheduler,
        steps: int,
        eta: float = 1.0,
        noisy: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.steps = steps
        self.noisy = range(*(noisy or (0, steps)))
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
        trained = list(self.noisy)
        _require_density(sigma[trained], timesteps[trained])
        sigma[[step for step in range(steps) if step not in self.noisy]] = 0
        self.register_buffer("timesteps", timesteps, persistent=False)
        for name, table in (("alpha", alpha), ("alpha_previous", alpha_previous), ("sigma", sigma)):
            self.register_buffer(name, table.float(), persistent=False)

    def sensitivity(self) -> Tensor:
        """Return c_t = |d mean / d noise| / sigma_t, `(T,)`; infinite where there is no noise.

        The derivative of the log-prob of an action by the noise prediction has this size.
        """
        alpha, alpha_previous, sigma = self.alpha, self.alpha_previous, self.sigma
        by_noise = (1 - alpha_previous - sigma**2).clamp(min=0).sqrt()
        by_noise = by_noise - (alpha_previous * (1 - alpha) / alpha).sqrt()
        return by_noise.abs() / sigma

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
        constant = noise.detach()
        mean = self.mean(latents, constant, index)
        if step not in self.noisy:
            return Transition(step, latents, mean, mean.new_zeros(len(mean)), constant)
        previous = mean + self.sigma[step] * self.noise(latents, generators)
        log_prob = self.log_prob(previous, latents, noise, index)
        return Transition(step, latents, previous, log_prob, constant)

    def noise(self, latents: Tensor, generators: list[torch.Generator]) -> Tensor:
        """Draw the noise of a batch's transition, `(B, C, H, W)`, from one CPU generator each."""
        noise = randn_tensor(latents.shape, generator=generators, device=torch.device("cpu"))
        return noise.to(latents.device)

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


class LatentDiffusion(nn.Module):
    """A Stable Diffusion pipeline taken apart: the U-Net may be trained, the rest is frozen.

    Args:
        pipeline: Its parts become this module's. What of the U-Net is frozen now stays out of
            checkpoints.
        steps: Denoising steps T.
        eta: Share of ancestral noise in each step, in (0, 1].
        guidance: Classifier-free guidance scale w; 1 is the conditional model alone.

    Attributes:
        latent_shape: Channels, height and width of x_t.
        text_cache: Where prompts' embeddings are kept beyond this run; None encodes them.
    """

    def __init__(
        self, pipeline: StableDiffusionPipeline, steps: int, eta: float, guidance: float
    ) -> None:
        super().__init__()
        self.tokenizer = pipeline.tokenizer
        self.text_encoder: Frozen[CLIPTextModel] = Frozen(pipeline.text_encoder)
        self.vae: Frozen[AutoencoderKL] = Frozen(pipeline.vae)
        self.unet: UNet2DConditionModel = pipeline.unet.train()
        omit_frozen(self.unet)
        size = self.unet.config["sample_size"]
        self.latent_shape: tuple[int, int, int] = (self.unet.config["in_channels"], size, size)
        self.noise_scheduler = pipeline.scheduler
        self.schedule = DDIMSchedule(pipeline.scheduler, steps, eta)
        self.guidance = guidance
        self.text_cache: TensorFolder | None = None
        self._embeddings: dict[str, Tensor] = {}

    def trajectory(
        self, prompts: list[str], noise_keys: Tensor, schedule: DDIMSchedule | None = None
    ) -> Iterator[Transition]:
        """Sample from x_T ~ N(0, I) down to x_0, each action drawn from the policy (Eq. 1).

        Args:
            prompts: B texts.
            noise_keys: `(B,)` int64; sample i depends on (prompt i, key i) alone.
            schedule: Another than the model's own.

        Yields:
            T transitions, each when it is asked for. Its log-prob is differentiable where
            gradients are enabled and noise is drawn, its action is a constant.
        """
        schedule = schedule or self.schedule
        text = self.embed(prompts)
        generators = [generator(key) for key in noise_keys.tolist()]
        latents = self.initial_latents(generators)
        for step in range(schedule.steps):
            timestep = schedule.timesteps[step].expand(len(latents))
            with torch.set_grad_enabled(torch.is_grad_enabled() and step in schedule.noisy):
                noise = self.predict_noise(latents, timestep, text)
            transition = schedule.draw(latents, noise, step, generators)
            yield transition
            latents = transition.previous

    def initial_latents(self, generators: list[torch.Generator]) -> Tensor:
        """Draw x_T ~ N(0, I), `(B, C, H, W)`: on the CPU, so that every device draws the same."""
        shape = (len(generators), *self.latent_shape)
        latents = randn_tensor(shape, generators, torch.device("cpu"))
        return latents.to(self.schedule.sigma.device)

    def sample(self, prompts: list[str], noise_keys: Tensor) -> Tensor:
        """Return one image a prompt in [0, 1], `(B, 3, H, W)`; arguments as for `trajectory`."""
        *_, last = self.trajectory(prompts, noise_keys)
        return self.decode(last.previous)

    def predict_noise(
        self, latents: Tensor, timestep: Tensor, text: Tensor, guided: bool = True
    ) -> Tensor:
        """Predict the noise with classifier-free guidance, e_u + w (e_c - e_u), in one batch.

        Args:
            latents: x_t, `(B, C, H, W)` float32.
            timestep: Of the noise schedule, `(B,)` int64.
            text: Prompt embeddings, `(B, L, D)`.
            guided: False predicts for the prompts alone, e_c.
        """
        if not guided or self.guidance == 1.0:
            return self.unet(latents, timestep, text, return_dict=False)[0].float()
        empty = self.embed([""]).expand_as(text)
        both = latents.repeat(2, 1, 1, 1), timestep.repeat(2), torch.cat([empty, text])
        noise = self.unet(*both, return_dict=False)[0].float()
        unconditional, conditional = noise.chunk(2)
        return unconditional + self.guidance * (conditional - unconditional)

    @property
    def image_size(self) -> int:
        """Side of the images in pixels."""
        halvings = len(self.vae.module.config["block_out_channels"]) - 1
        return self.latent_shape[1] << halvings

    def decode(self, latents: Tensor) -> Tensor:
        """Decode x_0 to images in [0, 1], `(B, 3, H, W)` float32."""
        scaled = latents / self.vae.module.config["scaling_factor"]
        image = self.vae.module.decode(scaled, return_dict=False)[0].float()
        return (image / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def embed(self, prompts: list[str]) -> Tensor:
        """Encode prompts, `(B, L, D)`; each distinct one is encoded once a run, and alone.

        In a batch the last bits would depend on its size, hence on the number of processes.
        """
        for prompt in dict.fromkeys(prompts):
            if prompt not in self._embeddings:
                ids = self.tokenizer(
                    [prompt], padding="max_length", truncation=True, return_tensors="pt",
                    max_length=self.tokenizer.model_max_length,
                ).input_ids  # fmt: skip
                encode = self._encode if self.text_cache is None else self._encode_once
                self._embeddings[prompt] = encode(ids.to(self.schedule.sigma.device))
        return torch.stack([self._embeddings[p] for p in prompts])

    def _encode(self, ids: Tensor) -> Tensor:
        """Embed the tokens of one prompt, `(1, L)`, to `(L, D)`."""
        with torch.autocast(ids.device.type, enabled=False):
            return self.text_encoder.module(ids)[0][0]

    def _encode_once(self, ids: Tensor) -> Tensor:
        """Embed the tokens of one prompt, unless the cache has them."""
        assert self.text_cache is not None
        tokens = key_of(ids.tolist())
        if tokens not in self.text_cache:
            self.text_cache.write(tokens, self._encode(ids))
        return self.text_cache.read(tokens).to(ids.device)

    @contextmanager
    def before_training(self, load: Callable[[], UNet2DConditionModel]) -> Iterator[None]:
        """Let the U-Net compute what it did before training: without adapters, or loaded again.

        Args:
            load: Reads the U-Net that training started from. Called only if the full U-Net is
                trained; it is then in memory twice as long as this lasts.
        """
        if has_lora(self.unet):
            with without_lora(self.unet):
                yield
            return
        trained = self.unet
        self.unet = load().to(self.schedule.sigma.device)  # pyright: ignore[reportArgumentType]
        try:
            yield
        finally:
            self.unet = trained

    def assembled(self) -> StableDiffusionPipeline:
        """Return the parts as a stock pipeline, with the U-Net as it is now."""
        return StableDiffusionPipeline(
            vae=self.vae.module,
            text_encoder=self.text_encoder.module,
            tokenizer=self.tokenizer,
            unet=self.unet,
            scheduler=self.noise_scheduler,
            **WITHOUT_SAFETY_CHECKER,
        )
