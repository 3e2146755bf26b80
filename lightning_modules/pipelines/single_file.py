"""Pipelines in a single .safetensors file, as other tools and the hub's older pages give them.

Such a file has the weights alone. Configurations and the tokenizer's vocabulary are taken from the
folder it lies in, if that is a pipeline's, and else from the repository of Stable Diffusion v1.5.
"""

from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from diffusers.loaders.single_file_utils import infer_diffusers_model_type
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rl4med_ddpo.foundation.errors import UserError, name_few
from rl4med_ddpo.lightning_modules.pipelines.source import (
    NETWORKS,
    SD15,
    UNREADABLE,
    check_folder,
    check_kind,
    fetch_pipeline,
)


def load_single_file(path: Path) -> StableDiffusionPipeline:
    """Load the pipeline in a file.

    Raises:
        UserError: if the file is missing, no safetensors, of another family, or incomplete; or if
            its configurations are not available.
    """
    if path.suffix != ".safetensors" or not path.is_file():
        why = "it may run code when it is read" if path.is_file() else "no such file"
        raise UserError(
            f"cannot load the pipeline {path}: {why}. Give a .safetensors file, or a folder in the "
            "diffusers layout."
        )
    _check_family(path)
    beside = path.parent / "model_index.json"
    layout = path.parent if beside.is_file() else fetch_pipeline(SD15, networks=())
    check_folder(layout)
    check_kind(StableDiffusionPipeline.load_config(layout), layout)
    try:
        pipeline = StableDiffusionPipeline.from_single_file(
            str(path), config=str(layout), local_files_only=True, safety_checker=None,
            feature_extractor=None,
        )  # fmt: skip
    except UNREADABLE as error:
        # diffusers leaves a missing tensor on the meta device, and falls over it
        why = "some are missing" if "meta tensor" in str(error) else error
        raise UserError(
            f"the weights in {path} do not fit the configurations in {layout}: {why}"
        ) from error
    _check_whole(pipeline, path)
    return pipeline.to(torch.float32)


def _check_family(path: Path) -> None:
    try:
        with safe_open(path, framework="pt") as file:
            shapes: dict[str, Tensor] = {
                key: torch.empty(file.get_slice(key).get_shape(), device="meta")
                for key in file.keys()
            }
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or no safetensors file: {error}") from error
    family = infer_diffusers_model_type(shapes)
    unet = any(key.startswith("model.diffusion_model.") for key in shapes)
    if family != "v1" or not unet:
        what = f"of the family {family!r}" if family != "v1" else "without a U-Net"
        raise UserError(
            f"the file {path} is {what}; needed is a whole Stable Diffusion v1.x (family 'v1'), "
            f"as v1-5-pruned-emaonly.safetensors of {SD15} is"
        )


def _check_whole(pipeline: StableDiffusionPipeline, path: Path) -> None:
    missing = [
        f"{name}.{key}"
        for name in NETWORKS
        for key, tensor in getattr(pipeline, name).state_dict().items()
        if tensor.is_meta
    ]
    if missing:
        raise UserError(
            f"the file {path} lacks {len(missing)} of the weights: {name_few(missing)}.\n"
            "  It is cut short, or was made for other configurations than those next to it."
        )
