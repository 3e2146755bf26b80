"""What fine-tuning and DDPO share: a pipeline whose U-Net is trained, and sampling from it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import lightning as L
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

from rl4med_ddpo.foundation.randomness import generator
from rl4med_ddpo.lightning_modules.diffusion.ddim import (
    DDIMSchedule,
    Transition,
    denoise,
    initial_latents,
)
from rl4med_ddpo.lightning_modules.networks.frozen import Frozen, omit_frozen
from rl4med_ddpo.lightning_modules.pipelines.load import load_pipeline, save_pipeline
from rl4med_ddpo.lightning_modules.pipelines.source import cached_commit, is_hub_id


def no_progress(phase: str, done: int, total: int) -> None:
    """Report nothing."""


class TextToImage(L.LightningModule):
    """A Stable Diffusion pipeline taken apart: the U-Net is free to train, the rest is frozen.

    Subclasses take `pipeline`, `unet`, `steps`, `eta`, `guidance` and `sample_batch` as
    hyperparameters.
    """

    report_progress: Callable[[str, int, int], None] = staticmethod(no_progress)

    def configure_model(self) -> None:
        """Load the pipeline and take it apart; done once."""
        if not hasattr(self, "unet"):
            # here Lightning makes the GPU the default device, and it moves the networks later
            with torch.device("cpu"):
                self.load_networks()

    def load_networks(self) -> None:
        """Load the pipeline and take it apart."""
        pipeline = load_pipeline(self.hparams.pipeline, self.hparams.unet)
        self.tokenizer = pipeline.tokenizer
        self.text_encoder = Frozen(pipeline.text_encoder)
        self.vae = Frozen(pipeline.vae)
        self.unet = pipeline.unet.train()
        self.prepare_unet(self.unet)
        omit_frozen(self.unet)
        self.noise_scheduler = pipeline.scheduler
        self.schedule = DDIMSchedule(pipeline.scheduler, self.hparams.steps, self.hparams.eta)
        self._embeddings: dict[str, Tensor] = {}

    def commits(self) -> dict[str, str | None]:
        """Return the commit of a hub id in the hub's cache, by the option that names it."""
        source = self.hparams.pipeline
        return {"pipeline": cached_commit(source) if is_hub_id(source) else None}

    def prepare_unet(self, unet: nn.Module) -> None:
        """Decide which of the U-Net's parameters are trained."""
        raise NotImplementedError

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
                self._embeddings[prompt] = self.encode_text(ids).to(self.device)
        return torch.stack([self._embeddings[p] for p in prompts])

    def encode_text(self, ids: Tensor) -> Tensor:
        """Run the text encoder on the tokens of one prompt, `(1, L)`, to `(L, D)`."""
        with torch.autocast(self.device.type, enabled=False):
            return self.text_encoder(ids.to(self.device))[0][0]

    def guided_noise(self, latents: Tensor, step: Tensor, text: Tensor, empty: Tensor) -> Tensor:
        """Predict the noise with classifier-free guidance, e_u + w (e_c - e_u), in one batch.

        Args:
            latents: x_t, `(B, C, H, W)` float32.
            step: Index of the transition, `(B,)`.
            text: Prompt embeddings, `(B, L, D)`.
            empty: Embedding of the empty prompt, `(L, D)`.
        """
        timestep = self.schedule.timesteps[step]
        if self.hparams.guidance == 1.0:
            return self.unet(latents, timestep, text, return_dict=False)[0].float()
        text = torch.cat([empty.expand_as(text), text])
        latents, timestep = latents.repeat(2, 1, 1, 1), timestep.repeat(2)
        unconditional, conditional = (
            self.unet(latents, timestep, text, return_dict=False)[0].float().chunk(2)
        )
        return unconditional + self.hparams.guidance * (conditional - unconditional)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of x_t."""
        size = self.unet.config.sample_size
        return (self.unet.config.in_channels, size, size)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode x_0 to images in [0, 1], `(B, 3, H, W)` float32."""
        scaled = latents / self.vae.module.config.scaling_factor
        image = self.vae.module.decode(scaled, return_dict=False)[0].float()
        return (image / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def generate(self, prompts: list[str], noise_keys: Tensor) -> Tensor:
        """Draw one image a prompt, in [0, 1], `(B, 3, H, W)`.

        Args:
            prompts: B texts.
            noise_keys: `(B,)` int64; image i depends on (prompt i, key i) alone.
        """
        images = []
        for first in range(0, len(prompts), self.hparams.sample_batch):
            part = slice(first, first + self.hparams.sample_batch)
            with self.trainer.precision_plugin.forward_context():
                _, transitions = self.walk(prompts[part], noise_keys[part])
                *_, last = transitions
                images.append(self.decode(last.previous))
            self.report_progress("sampling", min(part.stop, len(prompts)), len(prompts))
        return torch.cat(images)

    def walk(self, prompts: list[str], noise_keys: Tensor) -> tuple[Tensor, Iterator[Transition]]:
        """Return x_T, `(B, C, h, w)`, and the walk from there to x_0, taken as it is iterated."""
        text, empty = self.embed(prompts), self.embed([""])[0]
        generators = [generator(k) for k in noise_keys.tolist()]
        latents = initial_latents(self.latent_shape, generators).to(self.device)
        transitions = denoise(
            lambda x, step: self.guided_noise(x, step, text, empty),
            self.schedule,
            latents,
            generators,
        )
        return latents, transitions

    def assembled(self) -> StableDiffusionPipeline:
        """Return the parts as a stock pipeline, with the U-Net as it is now."""
        return StableDiffusionPipeline(
            vae=self.vae.module,
            text_encoder=self.text_encoder.module,
            tokenizer=self.tokenizer,
            unet=self.unet,
            scheduler=self.noise_scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

    def export(self, folder: Path) -> None:
        """Write what was trained in the diffusers format."""
        save_pipeline(self.assembled(), folder)
