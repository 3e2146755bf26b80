"""Stage 1: fine-tune the U-Net of Stable Diffusion on captioned images."""

from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.utils.torch_utils import randn_tensor
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torchmetrics import MeanMetric

from rl4med_ddpo.datamodules.isic import ISICDataset
from rl4med_ddpo.datamodules.latents import LatentCache
from rl4med_ddpo.datamodules.sampling import counted
from rl4med_ddpo.datamodules.tensor_folder import TensorFolder
from rl4med_ddpo.foundation.errors import UserError
from rl4med_ddpo.foundation.hashes import weights_digest
from rl4med_ddpo.foundation.randomness import Draw, generator, integers, key
from rl4med_ddpo.lightning_modules.diffusion.latent_filling import MissingVariants, fill
from rl4med_ddpo.lightning_modules.diffusion.lora import add_lora, merged, save_lora
from rl4med_ddpo.lightning_modules.diffusion.noise_prediction import min_snr_weights, offset_noise
from rl4med_ddpo.lightning_modules.pipelines.load import save_pipeline
from rl4med_ddpo.lightning_modules.text_to_image import TextToImage

CPU = torch.device("cpu")
"""Where all noise is drawn, so that every device has the same."""


class StableDiffusion(TextToImage):
    """Fine-tunes a pipeline's U-Net by noise prediction; the autoencoder and text encoder stay.

    Args:
        pipeline: The pipeline to start from: a folder in the diffusers layout, a .safetensors file,
            or a hub id (owner/name, or owner/name@revision to pin a commit).
        unet: Folder of a U-Net that replaces the pipeline's; null keeps it.
        train: The full U-Net, or low-rank adapters on its attention layers.
        lora_rank: Rank of the adapters.
        lora_alpha: The adapters' output is scaled by alpha / rank; null takes the rank.
        optimizer: The paper's: AdamW, 1e-5, weight decay 1e-2. Adapters want about 1e-4.
            `fused` takes the step in one kernel, on CPUs too.
        lr_scheduler: Stepped once per optimizer step; null keeps the rate constant.
        caption_dropout: Share of captions replaced by the empty prompt, so that classifier-free
            guidance has an unconditional model of skin to guide away from. The paper's authors
            trained without (0).
        min_snr_gamma: Weigh timesteps by min(SNR, gamma) / SNR; 5 is usual, null weighs all alike.
        noise_offset: Shift of each channel's noise as a whole, so that bright and dark images are
            learned; 0.05 to 0.1 is usual, 0 is the plain loss.
        gradient_checkpointing: Compute activations again in the backward pass: a third more time
            for far less memory.
        cache: Folder for the images' latents and the prompts' embeddings, made before the first
            step and read from then on in place of the images; null encodes them in each step. A
            changed image, size or autoencoder is rebuilt by itself. Flipped images are kept in
            each flip: 0.13 MB a flip at 512 pixels. Experiments may share it.
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
        train: Literal["full", "lora"] = "full",
        lora_rank: int = 4,
        lora_alpha: int | None = None,
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(
            p, lr=1e-5, weight_decay=1e-2, fused=True
        ),
        lr_scheduler: LRSchedulerCallable | None = None,
        caption_dropout: float = 0.1,
        min_snr_gamma: float | None = None,
        noise_offset: float = 0.0,
        gradient_checkpointing: bool = False,
        cache: str | None = None,
        steps: int = 50,
        eta: float = 1.0,
        guidance: float = 5.0,
        sample_batch: int = 8,
        seed: int = 42,
    ) -> None:
        super().__init__()
        if not 0 <= caption_dropout < 1:
            raise UserError(f"caption_dropout={caption_dropout}: allowed are 0 to below 1")
        if (min_snr_gamma is not None and min_snr_gamma <= 0) or noise_offset < 0:
            raise UserError(
                f"min_snr_gamma={min_snr_gamma}, noise_offset={noise_offset}: allowed are a gamma "
                "above 0, or null, and an offset of 0 or more"
            )
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        # a loss that is NaN shows as NaN
        self.mean_loss = MeanMetric(nan_strategy="disable")

    def prepare_unet(self, unet: UNet2DConditionModel) -> None:
        """Train all of the U-Net, or adapters on it."""
        hparams = self.hparams
        if hparams.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        if hparams.train == "lora":
            add_lora(unet, hparams.lora_rank, hparams.seed, hparams.lora_alpha)
        else:
            unet.requires_grad_(True)

    def on_fit_start(self) -> None:
        """Fill the cache, every rank its share, and let the data be read from it."""
        if self.hparams.cache is None:
            return
        data, world_size = self.trainer.datamodule, self.trainer.world_size
        named = [getattr(data, name, None) for name in ("train_set", "val_set")]
        splits = [split for split in named if isinstance(split, ISICDataset)]
        if len(splits) < len(named):
            raise UserError(
                f"cache={self.hparams.cache} keeps the latents of image files, which "
                f"{type(data).__name__} does not have: set model.init_args.cache: null"
            )
        if splits[0].distortion_seed is not None:
            raise UserError(
                f"cache={self.hparams.cache} keeps one latent an image, and data.init_args.distort "
                "makes another image of it in every epoch: set one of them to its default"
            )
        root = Path(self.hparams.cache)
        self.model.text_cache = TensorFolder(
            root / f"text-{weights_digest(self.model.text_encoder)}"
        )
        settings = (weights_digest(self.model.vae), data.size, data.resize, self.trainer.precision)
        for split in splits:
            latents = LatentCache(root, *settings)
            # a second turn, alone, finds nothing to do unless the ranks do not share the folder
            for share in ((self.global_rank, world_size), (0, 1)):
                missing = MissingVariants(split, latents, *share)
                fill(missing, self.encode, data.num_workers)
                self.trainer.strategy.barrier()
            split.latents = latents

    def configure_optimizers(self) -> Any:
        """Optimize the U-Net; a schedule is stepped with it."""
        optimizer = self.optimizer(self.trained_parameters())
        # Lightning clips no gradients that a fused step would unscale itself: let it unscale them
        optimizer._step_supports_amp_scaling = False  # pyright: ignore[reportAttributeAccessIssue]
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
        """Count the loss at noise and timesteps that each image has in every epoch."""
        seed = self.hparams.seed
        draw = [generator(key(seed, "validation", name)) for name in batch["id"]]
        errors = self.noise_prediction_errors(batch, batch["prompt"], draw)
        self.mean_loss.update(errors[counted(batch)])

    def on_validation_epoch_end(self) -> None:
        """Log the loss of the validation split."""
        self.log("val/loss", self.mean_loss.compute(), prog_bar=True)
        self.mean_loss.reset()

    def noise_prediction_loss(
        self, batch: dict[str, Any], prompts: list[str], draw: Draw
    ) -> Tensor:
        """Mean squared error of the predicted noise at uniformly drawn timesteps."""
        return self.noise_prediction_errors(batch, prompts, draw).mean()

    def noise_prediction_errors(
        self, batch: dict[str, Any], prompts: list[str], draw: Draw
    ) -> Tensor:
        """Squared error of each image's predicted noise, `(B,)`.

        Args:
            batch: `image` or `latents`.
            prompts: B texts.
            draw: One generator of all that is random, or one for each image.
        """
        latents = self.latents_of(batch, draw)
        noise = randn_tensor(latents.shape, draw, CPU).to(latents)
        levels = self.model.noise_scheduler.config.num_train_timesteps
        timestep = integers(levels, len(latents), draw).to(self.device)
        if self.hparams.noise_offset:
            shift = randn_tensor((*latents.shape[:2], 1, 1), draw, CPU).to(latents)
            noise = offset_noise(noise, shift, self.hparams.noise_offset)
        noisy = self.model.noise_scheduler.add_noise(latents, noise, timestep)
        predicted = self.model.unet(noisy, timestep, self.model.embed(prompts), return_dict=False)[
            0
        ]
        error = F.mse_loss(predicted.float(), noise, reduction="none").mean(dim=(1, 2, 3))
        if self.hparams.min_snr_gamma is not None:
            alpha = self.model.noise_scheduler.alphas_cumprod.to(self.device)[timestep]
            error = error * min_snr_weights(alpha, self.hparams.min_snr_gamma)
        return error

    def latents_of(self, batch: dict[str, Any], draw: Draw) -> Tensor:
        """Sample the images' latents from the autoencoder's posterior, scaled, `(B, C, h, w)`."""
        cached = batch.get("latents")
        distribution = self.encode(batch["image"]) if cached is None else cached
        mean, std = distribution.chunk(2, dim=1)
        sample = mean + std * randn_tensor(mean.shape, draw, CPU).to(mean)
        return sample * self.model.vae.module.config["scaling_factor"]

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Return mean and standard deviation of the posteriors, `(B, 2C, h, w)` float32.

        Args:
            images: `(B, 3, H, W)` in [0, 1].
        """
        with self.trainer.precision_plugin.forward_context():
            scaled = images.to(self.device) * 2 - 1
            posterior = self.model.vae.module.encode(scaled, return_dict=False)[0]
        return torch.cat([posterior.mean, posterior.std], dim=1).float()

    def draws(self, purpose: str, epoch: int, batch_idx: int) -> torch.Generator:
        """Return the generator of this rank's batch."""
        return generator(key(self.hparams.seed, purpose, epoch, batch_idx, self.global_rank))

    def export(self, folder: Path) -> None:
        """Write the pipeline; adapters are merged into its U-Net, and lie next to it in `lora`."""
        if self.hparams.train == "full":
            super().export(folder)
            return
        pipeline = self.model.assembled()
        pipeline.register_modules(unet=merged(self.model.unet))
        save_pipeline(pipeline, folder)
        save_lora(self.model.unet, folder / "lora")
