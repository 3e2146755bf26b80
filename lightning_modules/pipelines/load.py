"""Stable Diffusion pipelines in the diffusers format: find, load, check, save.

A pipeline is named by a local folder, by a single `.safetensors` file, or by a hub id such as
`stable-diffusion-v1-5/stable-diffusion-v1-5`, with `@` and a revision behind it to pin one. Weights
are read as safetensors, in float32: the U-Net is trained, and the trainer's precision decides what
it computes in.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.utils import logging as transformers_logging

from rl4med_ddpo.foundation.errors import UserError, name_few
from rl4med_ddpo.foundation.files import located
from rl4med_ddpo.lightning_modules.pipelines.single_file import load_single_file
from rl4med_ddpo.lightning_modules.pipelines.source import (
    NETWORKS,
    UNREADABLE,
    WITHOUT_SAFETY_CHECKER,
    check_folder,
    check_kind,
    fetch_pipeline,
    is_hub_id,
)

PREFIX = "text_model."

# small files, read in an instant: their own bars and notes would only break ours
for library in (diffusers_logging, transformers_logging):
    library.disable_progress_bar()
    library.set_verbosity_error()


def load_pipeline(source: str, unet: str | None = None) -> StableDiffusionPipeline:
    """Load a pipeline with its scheduler turned into DDIM; every network is in eval mode, frozen.

    Args:
        source: Folder, single file, or hub id with or without a revision.
        unet: Folder of a U-Net, or of a pipeline, whose U-Net replaces this one's.

    Raises:
        UserError: if nothing is there, a component is missing, it is another kind of pipeline, or
            weights and configuration do not belong together.
    """
    path = located(source)
    if path.is_file() or source.endswith((".safetensors", ".ckpt")):
        pipeline = load_single_file(path)
    else:
        pipeline = _from_folder(fetch_pipeline(source) if is_hub_id(source) else path)
    if unet is not None:
        pipeline.register_modules(unet=load_unet(Path(unet)))
    _check_widths(pipeline, unet or source)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    for name in NETWORKS:
        getattr(pipeline, name).requires_grad_(False).eval()
    return pipeline


def load_unet(folder: Path) -> UNet2DConditionModel:
    """Load a U-Net from its own folder, as diffusers' scripts leave one, or from a pipeline's."""
    if (folder / "unet" / "config.json").is_file():
        folder = folder / "unet"
    if not (folder / "config.json").is_file():
        raise UserError(
            f"there is no U-Net at {folder}: no config.json in it, nor in a folder unet in it.\n"
            "  Give a folder with config.json and diffusion_pytorch_model.safetensors, or the "
            "folder of a pipeline."
        )
    unet = _load_network("unet", folder, folder)
    assert isinstance(unet, UNet2DConditionModel)
    return unet


def _from_folder(folder: Path) -> StableDiffusionPipeline:
    check_folder(folder)
    check_kind(StableDiffusionPipeline.load_config(folder), folder)
    networks = {name: _load_network(name, folder / name, folder) for name in NETWORKS}
    try:
        return StableDiffusionPipeline.from_pretrained(folder, **networks, **WITHOUT_SAFETY_CHECKER)
    except UNREADABLE as error:
        raise UserError(_damaged(folder, error)) from error


def _load_network(name: str, folder: Path, whole: Path) -> nn.Module:
    try:
        network, report = NETWORKS[name].from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
    except UNREADABLE as error:
        raise UserError(_damaged(whole, error)) from error
    _check_fit(name, folder, report)
    return network


def _check_fit(name: str, folder: Path, report: dict[str, Any]) -> None:
    # diffusers and transformers fill what is missing with random numbers, and continue
    wrong = {what: sorted(report[f"{what}_keys"]) for what in ("missing", "unexpected")}
    if name == "text_encoder":
        # of old files: a buffer that is rebuilt, and the projections of a whole CLIP
        wrong["unexpected"] = []
    if any(wrong.values()):
        found = "; ".join(f"{w}: {len(k)}, such as {name_few(k)}" for w, k in wrong.items() if k)
        raise UserError(
            f"the weights in {folder} do not fit its config.json ({found}).\n"
            "  Both must come from the same model: copy or export it again."
        )


def _check_widths(pipeline: StableDiffusionPipeline, source: str) -> None:
    """Refuse a U-Net that speaks of other latents or another text encoder than the pipeline's."""
    unet = pipeline.unet.config
    given = {
        "latent channels": (unet.in_channels, pipeline.vae.config.latent_channels),
        "width of the text embedding": (
            unet.cross_attention_dim,
            pipeline.text_encoder.config.hidden_size,
        ),
    }
    wrong = [f"{name}: {a} of the U-Net, {b} here" for name, (a, b) in given.items() if a != b]
    if wrong:
        raise UserError(
            f"the U-Net of {source} does not fit the other components ({'; '.join(wrong)}).\n"
            "  Give a U-Net that was trained from this pipeline, or the pipeline it belongs to."
        )


def _damaged(folder: Path, error: Exception) -> str:
    return (
        f"cannot load the pipeline at {folder}: its files are incomplete, damaged, or do not fit "
        f"their configuration. Copy or export it again.\n  {error}"
    )


def save_pipeline(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    """Write the pipeline as safetensors so that `from_pretrained(folder)` opens it."""
    pipeline.save_pretrained(folder, safe_serialization=True)
    _name_as_before(folder / "text_encoder" / "model.safetensors")


def _name_as_before(file: Path) -> None:
    """Give the text encoder's weights the names of Stable Diffusion v1.5's own files.

    The transformers from 5.0 on write them without the prefix and read both; those before, and the
    tools that convert pipelines, fill a text encoder without it with random numbers and continue.
    """
    weights = load_file(file)
    if not any(name.startswith(PREFIX) for name in weights):
        named = {PREFIX + name: weight for name, weight in weights.items()}
        save_file(named, file, metadata={"format": "pt"})
