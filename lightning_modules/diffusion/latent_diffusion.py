"""The diffusion model: prompts and noise in, trajectories and images out."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel

from rl4med_ddpo.datamodules.tensor_folder import TensorFolder
from rl4med_ddpo.foundation.hashes import key_of
from rl4med_ddpo.foundation.randomness import generator
from rl4med_ddpo.lightning_modules.diffusion.ddim import (
    DDIMSchedule,
    Transition,
    initial_latents,
)
from rl4med_ddpo.lightning_modules.diffusion.lora import has_lora, without_lora
from rl4med_ddpo.lightning_modules.networks.frozen import Frozen, omit_frozen
from rl4med_ddpo.lightning_modules.pipelines.source import LEFT_OUT


class LatentDiffusion(nn.Module):
    """A Stable Diffusion pipeline taken apart: the U-Net may be trained, the rest is frozen.

    Args:
        pipeline: Its parts become this module's. What of the U-Net is frozen now stays out of
            checkpoints.
        steps: Denoising steps T.
        eta: Share of ancestral noise in each step, in (0, 1].
        guidance: Classifier-free guidance scale w; 1 is the conditional model alone.

    Attributes:
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
        self.noise_scheduler = pipeline.scheduler
        self.schedule = DDIMSchedule(pipeline.scheduler, steps, eta)
        self.guidance = guidance
        self.text_cache: TensorFolder | None = None
        self._embeddings: dict[str, Tensor] = {}

    @property
    def device(self) -> torch.device:
        """Where the tables and networks are."""
        return self.schedule.sigma.device

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of x_t."""
        size = self.unet.config["sample_size"]
        return (self.unet.config["in_channels"], size, size)

    def trajectory(self, prompts: list[str], noise_keys: Tensor) -> Iterator[Transition]:
        """Sample from x_T ~ N(0, I) down to x_0, each action drawn from the policy (Eq. 1).

        Args:
            prompts: B texts.
            noise_keys: `(B,)` int64; sample i depends on (prompt i, key i) alone.

        Yields:
            T transitions, each when it is asked for. Its log-prob is differentiable where
            gradients are enabled, its action is a constant.
        """
        text, empty = self.embed(prompts), self.embed([""])[0]
        generators = [generator(key) for key in noise_keys.tolist()]
        latents = initial_latents(self.latent_shape, generators).to(self.device)
        for step in range(len(self.schedule)):
            index = torch.full((len(latents),), step, device=self.device)
            noise = self.guided_noise(latents, index, text, empty)
            transition = self.schedule.draw(latents, noise, step, generators)
            yield transition
            latents = transition.previous

    def sample(self, prompts: list[str], noise_keys: Tensor) -> Tensor:
        """Return one image a prompt in [0, 1], `(B, 3, H, W)`; arguments as for `trajectory`."""
        *_, last = self.trajectory(prompts, noise_keys)
        return self.decode(last.previous)

    def guided_noise(self, latents: Tensor, step: Tensor, text: Tensor, empty: Tensor) -> Tensor:
        """Predict the noise with classifier-free guidance, e_u + w (e_c - e_u), in one batch.

        Args:
            latents: x_t, `(B, C, H, W)` float32.
            step: Index of the transition, `(B,)`.
            text: Prompt embeddings, `(B, L, D)`.
            empty: Embedding of the empty prompt, `(L, D)`.
        """
        if self.guidance == 1.0:
            return self.conditional_noise(latents, step, text)
        timestep = self.schedule.timesteps[step]
        text = torch.cat([empty.expand_as(text), text])
        latents, timestep = latents.repeat(2, 1, 1, 1), timestep.repeat(2)
        unconditional, conditional = (
            self.unet(latents, timestep, text, return_dict=False)[0].float().chunk(2)
        )
        return unconditional + self.guidance * (conditional - unconditional)

    def conditional_noise(self, latents: Tensor, step: Tensor, text: Tensor) -> Tensor:
        """Predict the noise for the prompts alone, without guidance; arguments as above."""
        timestep = self.schedule.timesteps[step]
        return self.unet(latents, timestep, text, return_dict=False)[0].float()

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
                self._embeddings[prompt] = self._encoded(ids).to(self.device)
        return torch.stack([self._embeddings[p] for p in prompts])

    def _encoded(self, ids: Tensor) -> Tensor:
        """Embed the tokens of one prompt, `(1, L)`, to `(L, D)`; from the cache if there is one."""
        if self.text_cache is None:
            return self._encode(ids)
        tokens = key_of(ids.tolist())
        if tokens not in self.text_cache:
            self.text_cache.write(tokens, self._encode(ids))
        return self.text_cache.read(tokens)

    def _encode(self, ids: Tensor) -> Tensor:
        with torch.autocast(self.device.type, enabled=False):
            return self.text_encoder(ids.to(self.device))[0][0]

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
        self.unet = load().to(self.device)  # pyright: ignore[reportArgumentType]
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
            **LEFT_OUT,
        )
