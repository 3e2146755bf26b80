"""Stage 1: fine-tune the U-Net of Stable Diffusion on captioned images."""

from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from datamodules.errors import UserError
from lightning_modules.randomness import generator, key
from lightning_modules.text_to_image import TextToImage


class StableDiffusion(TextToImage):
    """Fine-tunes a pipeline's U-Net by noise prediction; the autoencoder and text encoder stay.

    Args:
        pipeline: The pipeline to start from: a folder in the diffusers layout, a .safetensors file,
            or a hub id (owner/name, or owner/name@revision to pin a commit).
        unet: Folder of a U-Net that replaces the pipeline's; null keeps it.
        optimizer: The paper's: AdamW, 1e-5, weight decay 1e-2.
        lr_scheduler: Stepped once per optimizer step; null keeps the rate constant.
        caption_dropout: Share of captions replaced by the empty prompt, so that classifier-free
            guidance has an unconditional model of skin to guide away from. The paper's authors
            trained without (0).
        cache_latents: Encode each image once and keep its latent distribution in memory. Wants
            images that are the same in every epoch (`data.augment: false`).
        steps: Denoising steps of the sample grids.
        eta: Share of ancestral noise in the sample grids' steps, in (0, 1].
        guidance: Guidance scale of the sample grids.
        sample_batch: Images sampled at a time.
        seed: Decides noise, timesteps and dropped captions together with epoch, batch and rank.
    """

    def __init__(
        self,
        pipeline: str,
        unet: str | None = None,
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=1e-5, weight_decay=1e-2),
        lr_scheduler: LRSchedulerCallable | None = None,
        caption_dropout: float = 0.1,
        cache_latents: bool = False,
        steps: int = 50,
        eta: float = 1.0,
        guidance: float = 5.0,
        sample_batch: int = 8,
        seed: int = 42,
    ) -> None:
        super().__init__()
        if not 0 <= caption_dropout < 1:
            raise UserError(f"caption_dropout={caption_dropout}: allowed are 0 to below 1")
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.latent_cache: dict[str, Tensor] = {}

    def setup(self, stage: str) -> None:
        """Refuse to cache what changes from epoch to epoch."""
        if self.hparams.cache_latents and getattr(self.trainer.datamodule, "augment", False):
            raise UserError(
                "cache_latents keeps the first epoch's images, so augmented ones would repeat for "
                "ever: set data.init_args.augment: false, or model.init_args.cache_latents: false"
            )

    def prepare_unet(self, unet: nn.Module) -> None:
        """Train all of the U-Net."""
        unet.requires_grad_(True)

    def configure_optimizers(self) -> Any:
        """Optimize the U-Net; a schedule is stepped with it."""
        optimizer = self.optimizer(self.unet.parameters())
        if self.lr_scheduler is None:
            return optimizer
        scheduler = {"scheduler": self.lr_scheduler(optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Return the loss of one batch, some of its captions dropped."""
        draw = self.draws("fine-tune", self.current_epoch, batch_idx)
        dropped = torch.rand(len(batch["prompt"]), generator=draw) < self.hparams.caption_dropout
        prompts = ["" if d else p for d, p in zip(dropped, batch["prompt"], strict=True)]
        loss = self.noise_prediction_loss(batch, prompts, draw)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(prompts))
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Log the loss at noise and timesteps that are the same in every epoch."""
        loss = self.noise_prediction_loss(
            batch, batch["prompt"], self.draws("validation", 0, batch_idx)
        )
        self.log("val/loss", loss, prog_bar=True, sync_dist=True, batch_size=len(batch["prompt"]))

    def noise_prediction_loss(
        self, batch: dict[str, Any], prompts: list[str], draw: torch.Generator
    ) -> Tensor:
        """Mean squared error of the predicted noise at uniformly drawn timesteps."""
        latents = self.latents_of(batch, draw)
        noise = torch.randn(latents.shape, generator=draw).to(latents)
        levels = self.noise_scheduler.config.num_train_timesteps
        timestep = torch.randint(levels, (len(latents),), generator=draw).to(self.device)
        noisy = self.noise_scheduler.add_noise(latents, noise, timestep)
        predicted = self.unet(noisy, timestep, self.embed(prompts), return_dict=False)[0]
        return F.mse_loss(predicted.float(), noise)

    def latents_of(self, batch: dict[str, Any], draw: torch.Generator) -> Tensor:
        """Sample the images' latents from the autoencoder's posterior, scaled, `(B, C, h, w)`."""
        mean, std = self.latent_distribution(batch).to(self.device).chunk(2, dim=1)
        sample = mean + std * torch.randn(mean.shape, generator=draw).to(mean)
        return sample * self.vae.module.config.scaling_factor

    def latent_distribution(self, batch: dict[str, Any]) -> Tensor:
        """Mean and standard deviation of the images' posteriors, `(B, 2C, h, w)` float32."""
        ids = batch["id"]
        if all(i in self.latent_cache for i in ids):
            return torch.stack([self.latent_cache[i] for i in ids])
        with torch.no_grad():
            posterior = self.vae.module.encode(batch["image"] * 2 - 1).latent_dist
            distribution = torch.cat([posterior.mean, posterior.std], dim=1).float()
        if self.hparams.cache_latents:
            self.latent_cache.update(zip(ids, distribution.cpu(), strict=True))
        return distribution

    def draws(self, purpose: str, epoch: int, batch_idx: int) -> torch.Generator:
        """Return the generator of this rank's batch."""
        return generator(key(self.hparams.seed, purpose, epoch, batch_idx, self.global_rank))
