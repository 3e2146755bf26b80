"""Stable Diffusion pipelines in the diffusers format: load, check, save.

A pipeline is named by a local folder or by a hub id such as
`stable-diffusion-v1-5/stable-diffusion-v1-5`. Weights are read as safetensors, in float32: the
U-Net is trained, and the trainer's precision decides what it computes in.
"""

import os
import re
from pathlib import Path

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from transformers.utils import logging as transformers_logging

from datamodules.errors import UserError

# small files, read in an instant: their own bars and notes would only break ours
for library in (diffusers_logging, transformers_logging):
    library.disable_progress_bar()
    library.set_verbosity_error()

COMPONENTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def is_hub_id(source: str) -> bool:
    """Tell whether a pipeline's name can only be a hub id: `owner/name`, and no such folder."""
    return bool(_HUB_ID.fullmatch(source)) and not Path(source).exists()


def load_pipeline(source: str) -> StableDiffusionPipeline:
    """Load a pipeline with its scheduler turned into DDIM; every network is in eval mode, frozen.

    Args:
        source: Folder or hub id. `HF_HUB_OFFLINE=1` keeps it from asking the network.

    Raises:
        UserError: if nothing is there, a component is missing, or it is another kind of pipeline.
    """
    if not is_hub_id(source):
        _check_folder(Path(source))
    try:
        _check_kind(source)
        pipeline = StableDiffusionPipeline.from_pretrained(
            source,
            dtype=torch.float32,
            use_safetensors=True,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(_cannot_load(source, error)) from error
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    for name in ("unet", "vae", "text_encoder"):
        getattr(pipeline, name).requires_grad_(False).eval()
    return pipeline


def _check_kind(source: str) -> None:
    kind = StableDiffusionPipeline.load_config(source)["_class_name"]
    if kind != StableDiffusionPipeline.__name__:
        raise UserError(
            f"the pipeline {source} is a {kind}; needed is a StableDiffusionPipeline, as "
            "stable-diffusion-v1-5/stable-diffusion-v1-5 is"
        )


def _cannot_load(source: str, error: Exception) -> str:
    if not is_hub_id(source):
        return (
            f"cannot load the pipeline at {source}: its files are incomplete or damaged. Copy or "
            f"export it again.\n  {error}"
        )
    return (
        f"cannot load the pipeline {source!r}: {type(error).__name__}\n"
        "  It is neither a folder here nor in the hub's cache, and the hub did not give it.\n"
        f"  Fetch it where there is a network: hf download {source}\n"
        f"  and set HF_HOME to that cache (now {os.environ.get('HF_HOME', 'the default')}), or "
        "give its folder instead."
    )


def _check_folder(folder: Path) -> None:
    index = folder / "model_index.json"
    if not index.is_file():
        why = "no model_index.json in it" if folder.is_dir() else "no such folder"
        raise UserError(
            f"no pipeline at {folder}: {why}.\n"
            "  Give a folder in the diffusers layout, as `python run.py fit --config sd.yaml` "
            "writes to runs/sd/pipeline,\n"
            "  or a hub id such as stable-diffusion-v1-5/stable-diffusion-v1-5."
        )
    missing = [name for name in COMPONENTS if not (folder / name).is_dir()]
    if missing:
        raise UserError(
            f"the pipeline at {folder} lacks {', '.join(missing)}; Stable Diffusion has "
            f"{', '.join(COMPONENTS)}, each a folder"
        )


def save_pipeline(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    """Write the pipeline as safetensors so that `from_pretrained(folder)` opens it."""
    pipeline.save_pretrained(folder, safe_serialization=True)
