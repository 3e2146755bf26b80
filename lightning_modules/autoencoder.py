"""Train the decoder of a pipeline's autoencoder: how the embedded base learns to draw."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from diffusers import AutoencoderKL
from lightning.fabric.utilities.data import AttributeDict
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torchmetrics import MeanMetric

from rl4med_ddpo.datamodules.sampling import counted
from rl4med_ddpo.foundation.errors import UserError
from rl4med_ddpo.foundation.randomness import generator, key
from rl4med_ddpo.foundation.trainer import require_precision
from rl4med_ddpo.lightning_modules.classifier import load_classifier
from rl4med_ddpo.lightning_modules.diffusion.reconstruction import (
    feature_loss,
    pixel_loss,
    signal_to_noise,
)
from rl4med_ddpo.lightning_modules.networks.frozen import Frozen, omit_frozen
from rl4med_ddpo.lightning_modules.pipelines.load import load_pipeline, save_pipeline
from rl4med_ddpo.lightning_modules.pipelines.source import cached_commit, is_hub_id


class Autoencoder(L.LightningModule):
    """Trains the decoder of a pipeline's autoencoder; the encoder, and so the latents, stay.

    Hence the U-Net can be trained on the latents at the same time, apart from the decoder.

    Args:
        pipeline: Folder or hub id of the pipeline whose decoder is trained.
        perceptual: Checkpoint of an AttributeClassifier. Its features are compared besides the
            pixels, so that what tells an attribute survives, and its readings are logged.
        perceptual_weight: Weight of the features relative to the pixels; 0 leaves them out.
        layers: Feature maps that are compared, from the first.
        optimizer: Builds the optimizer of the decoder.
        lr_scheduler: Stepped once per optimizer step; null keeps the rate constant.
    """

    # narrower than Lightning declares it
    hparams: AttributeDict
    vae: AutoencoderKL

    def __init__(
        self,
        pipeline: str,
        perceptual: str,
        perceptual_weight: float = 0.5,
        layers: int = 4,
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=1e-3),
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        if perceptual_weight < 0 or layers < 1:
            raise UserError(
                f"perceptual_weight={perceptual_weight}, layers={layers}: allowed are a weight of "
                "0 or more and at least one layer"
            )
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        # a value that is NaN shows as NaN
        self.psnr = MeanMetric(nan_strategy="disable")
        self.same_reading = MeanMetric(nan_strategy="disable")

    def setup(self, stage: str) -> None:
        """Refuse a precision that changes the weights' type."""
        require_precision(self.trainer)

    def configure_model(self) -> None:
        """Load the pipeline and the classifier; free the decoder alone."""
        if hasattr(self, "vae"):
            return
        # here Lightning makes the GPU the default device, and it moves the networks later
        with torch.device("cpu"):
            self.pipeline = load_pipeline(self.hparams.pipeline)
            self.perceptual = Frozen(load_classifier(self.hparams.perceptual))
        self.vae = self.pipeline.vae
        self.vae.decoder.requires_grad_(True)
        omit_frozen(self)

    def commits(self) -> dict[str, str | None]:
        """Return the commit of a hub id in the hub's cache, by the option that names it."""
        source = self.hparams.pipeline
        return {"pipeline": cached_commit(source) if is_hub_id(source) else None}

    def configure_optimizers(self) -> Any:
        """Return the decoder's optimizer, with its schedule if there is one."""
        optimizer = self.optimizer(self.vae.decoder.parameters())
        if self.lr_scheduler is None:
            return optimizer
        scheduler = {"scheduler": self.lr_scheduler(optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def forward(self, images: Tensor, draw: list[torch.Generator] | None = None) -> Tensor:
        """Encode and decode images, `(B, 3, H, W)` in [0, 1], from a sample of the posterior.

        Args:
            images: B images.
            draw: A generator for each image; by default torch's own.
        """
        with torch.no_grad():
            posterior = self.vae.encode(images * 2 - 1, return_dict=False)[0]
            latents = posterior.sample(draw)  # pyright: ignore[reportArgumentType]
        decoded = self.vae.decode(latents, return_dict=False)[0]  # pyright: ignore[reportArgumentType]
        return decoded.float() / 2 + 0.5

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Return the loss of one batch's reconstructions."""
        images = batch["image"]
        reconstruction = self(images)
        pixels = pixel_loss(reconstruction, images)
        self.log("train/pixels", pixels, prog_bar=True)
        if not self.hparams.perceptual_weight:
            return pixels
        with torch.no_grad():
            wanted = self.features(images)
        features = feature_loss(self.features(reconstruction), wanted)
        self.log("train/features", features, prog_bar=True)
        return pixels + self.hparams.perceptual_weight * features

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Count how near reconstructions are, and how many read as the images do."""
        images, rows = batch["image"], counted(batch)
        draw = [generator(key(0, "validation", name)) for name in batch["id"]]
        reconstruction = self(images, draw).clamp(0, 1)
        same = (self.perceptual(reconstruction) > 0) == (self.perceptual(images) > 0)
        self.psnr.update(signal_to_noise(reconstruction, images)[rows])
        self.same_reading.update(same.all(dim=1).float()[rows])

    def on_validation_epoch_end(self) -> None:
        """Log the means over the validation split."""
        for name, metric in (("psnr", self.psnr), ("same_reading", self.same_reading)):
            self.log(f"val/{name}", metric.compute(), prog_bar=True)
            metric.reset()

    def features(self, images: Tensor) -> list[Tensor]:
        """Return the classifier's first feature maps of images in [0, 1]."""
        classifier = self.perceptual.module
        return classifier.network.forward_intermediates(
            (images - classifier.mean) / classifier.std,
            indices=list(range(self.hparams.layers)),
            intermediates_only=True,
        )

    def export(self, folder: Path) -> None:
        """Write the pipeline with the decoder as it is now."""
        save_pipeline(self.pipeline, folder)
