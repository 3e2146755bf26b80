"""Fine-tuning at a size that runs in seconds."""

from functools import partial

import lightning as L
import torch
from torch.utils.data import DataLoader

from rl4med_ddpo.datamodules.isic import ISICDataModule
from rl4med_ddpo.lightning_modules import StableDiffusion
from rl4med_ddpo.lightning_modules.pipelines.load import load_pipeline
from support.dermoscopy import CONDITIONS, PROMPTS
from support.trainers import quiet_trainer

# AdamW would turn the last digit of a gradient near zero into a step
SGD = {"optimizer": partial(torch.optim.SGD, lr=0.1), "steps": 4}


class Captioned(L.LightningDataModule):
    """Sixteen images, as bright as the row of their prompt says, in the same order every epoch."""

    def __init__(self):
        super().__init__()
        rows = torch.arange(16) * 2
        noise = torch.rand(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        images = (rows.view(-1, 1, 1, 1) / 32 + noise) / 2
        self.items = [
            {
                "image": image,
                "prompt": PROMPTS[row],
                "condition": CONDITIONS[row],
                "id": f"image_{row}",
            }
            for image, row in zip(images, rows.tolist(), strict=True)
        ]

    def train_dataloader(self):
        return DataLoader(self.items, batch_size=4)

    def val_dataloader(self):
        return DataLoader(self.items, batch_size=8)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-3)


def module(pipeline, **options):
    defaults = {"pipeline": pipeline, "optimizer": adamw, "steps": 4, "guidance": 3.0}
    return StableDiffusion(**(defaults | options))


def fit(model, folder, epochs=2, data=None, ckpt_path=None, **options):
    trainer = quiet_trainer(folder, max_epochs=epochs, **options)
    trainer.fit(model, datamodule=data or Captioned(), ckpt_path=ckpt_path)
    return trainer


def unet_of(pipeline):
    return {f"model.unet.{k}": v for k, v in load_pipeline(pipeline).unet.state_dict().items()}


def images_of(isic, augment=True, **options):
    return ISICDataModule(
        str(isic), **{"size": 16, "batch_size": 4, "num_workers": 0, "augment": augment, **options}
    )
