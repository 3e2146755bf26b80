"""The first picture of `make demo`: what is to be drawn, and what the untrained pipeline draws."""

from pathlib import Path

import torch
from torch.utils.data import default_collate

from rl4med_ddpo.callbacks.sample_grid import readable_prompts
from rl4med_ddpo.datamodules.isic import ISICDataModule
from rl4med_ddpo.datamodules.vocabulary import DERMOSCOPY
from rl4med_ddpo.foundation.randomness import keys
from rl4med_ddpo.lightning_modules.classifier import load_classifier
from rl4med_ddpo.lightning_modules.diffusion.latent_diffusion import LatentDiffusion
from rl4med_ddpo.lightning_modules.pipelines.load import load_pipeline
from rl4med_ddpo.report.sheet import Panel, beside, in_rows, save_png, sheet

IMAGES_PER_PROMPT = 3
STEPS, GUIDANCE = 8, 3.0


@torch.no_grad()
def first_look(pipeline: str, data: Path, classifier: Path, path: Path) -> None:
    """Set real images beside those of a pipeline, each with what a classifier reads in it.

    Args:
        pipeline: Folder or hub id.
        data: Folder in ISIC 2019's layout.
        classifier: Checkpoint.
        path: Of the PNG to write.
    """
    vocabulary = DERMOSCOPY
    prompts = [p for p in readable_prompts(vocabulary) for _ in range(IMAGES_PER_PROMPT)]
    asked = torch.stack([vocabulary.conditions[vocabulary.prompt_id(p)] for p in prompts])
    model = LatentDiffusion(load_pipeline(pipeline), STEPS, 1.0, GUIDANCE)
    drawn = model.sample(prompts, keys(0, "grid", 0, torch.arange(len(prompts))))
    read = load_classifier(classifier)
    sheets = []
    for images in (_labelled(data, asked, model.image_size), drawn):
        shown = read(images) > 0
        captions = [_caption(*both) for both in zip(asked.bool(), shown, strict=True)]
        panels = [Panel([i], text) for i, text in zip(images, captions, strict=True)]
        sheets.append(sheet(in_rows(panels, columns=2 * IMAGES_PER_PROMPT)))
    save_png(beside(sheets, ("Drawn dermoscopy, by label", "The embedded base pipeline")), path)


def _labelled(root: Path, asked: torch.Tensor, size: int) -> torch.Tensor:
    """Return the first images with the labels that are asked for, each one once."""
    images = ISICDataModule(str(root), size=size).dataset("test")
    labelled = default_collate([images[i] for i in range(len(images))])
    left, rows = list(range(len(images))), []
    for condition in asked:
        rows.append(next(i for i in left if torch.equal(labelled["condition"][i], condition)))
        left.remove(rows[-1])
    return labelled["image"][rows]


def _caption(asked: torch.Tensor, read: torch.Tensor) -> str:
    said = DERMOSCOPY.caption(asked)
    return said if torch.equal(asked, read) else f"{said}, read as {DERMOSCOPY.caption(read)}"
