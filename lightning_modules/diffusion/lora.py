"""Low-rank adapters (LoRA) on the U-Net's attention layers, in the diffusers format."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.lora_base import (
    LORA_ADAPTER_METADATA_KEY,
    LORA_WEIGHT_NAME_SAFE,
)
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from torch import nn

from rl4med_ddpo.foundation.errors import UserError
from rl4med_ddpo.lightning_modules.pipelines.load import load_unet
from rl4med_ddpo.lightning_modules.pipelines.source import UNREADABLE

ADAPTER = "policy"
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
"""Layers of each attention that are adapted."""


def add_lora(unet: UNet2DConditionModel, rank: int, seed: int, alpha: int | None = None) -> None:
    """Add trainable adapters; the U-Net computes what it did until they train.

    Args:
        unet: All of its own weights frozen.
        rank: Rank of each adapter.
        seed: Decides the adapters' first weights.
        alpha: The adapters' output is scaled by alpha / rank; None takes the rank.
    """
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha or rank,
        init_lora_weights="gaussian",
        target_modules=list(TARGETS),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet.add_adapter(config, adapter_name=ADAPTER)


def adapter_layers(unet: UNet2DConditionModel) -> list[nn.Linear]:
    """List the layers that hold the adapters' weights, down and up, in the U-Net's order."""
    ends = (f"lora_A.{ADAPTER}", f"lora_B.{ADAPTER}")
    return [
        module
        for name, module in unet.named_modules()
        if name.endswith(ends) and isinstance(module, nn.Linear)
    ]


def has_lora(unet: UNet2DConditionModel) -> bool:
    """Tell whether a U-Net has this project's adapters."""
    return ADAPTER in getattr(unet, "peft_config", {})


@contextmanager
def without_lora(unet: UNet2DConditionModel) -> Iterator[None]:
    """Let the U-Net compute what it did before it had adapters: the reference policy."""
    unet.disable_adapters()
    try:
        yield
    finally:
        unet.enable_adapters()


def save_lora(unet: UNet2DConditionModel, folder: Path) -> None:
    """Write the adapters so that `StableDiffusionPipeline.load_lora_weights(folder)` reads them.

    The adapters' configuration travels in the file's metadata; without it an alpha other than the
    rank would be lost.
    """
    weights = get_peft_model_state_dict(unet, adapter_name=ADAPTER)
    StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers=convert_state_dict_to_diffusers(weights),
        unet_lora_adapter_metadata=unet.peft_config[ADAPTER].to_dict(),
        safe_serialization=True,
    )


def merged(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Return a U-Net of its own that computes what this one does with its adapters."""
    with_adapters = deepcopy(unet)
    with_adapters.fuse_lora()
    with_adapters.unload_lora()
    plain = UNet2DConditionModel.from_config(unet.config)
    assert isinstance(plain, UNet2DConditionModel)
    # by name of the parameter: the state dict of a U-Net in training leaves out what is frozen
    plain.load_state_dict(dict(with_adapters.named_parameters()))
    return plain


def load_policy(unet: UNet2DConditionModel, folder: Path) -> None:
    """Make a pipeline's U-Net the policy that was exported to a folder.

    Args:
        unet: The U-Net of the pipeline that training started from.
        folder: Adapters, or a whole pipeline whose U-Net replaces this one's weights.

    Raises:
        UserError: if there are no safetensors of either kind, or not all of them.
    """
    try:
        if (folder / "model_index.json").is_file():
            unet.load_state_dict(load_unet(folder).state_dict())
        else:
            unet.load_lora_adapter(
                str(folder), prefix="unet", adapter_name=ADAPTER, use_safetensors=True
            )
            _require_whole(unet, folder)
    except UNREADABLE as error:
        raise UserError(
            f"cannot load the policy at {folder}: {error}\n"
            "  Needed are adapters for this pipeline, pytorch_lora_weights.safetensors, or a whole "
            "pipeline in safetensors, as `fit` exports them."
        ) from error
    unet.requires_grad_(False)


def _require_whole(unet: UNet2DConditionModel, folder: Path) -> None:
    """Refuse a file that lacks adapters: peft would make them up, or leave them out.

    A file's metadata says which layers it adapts; without, they are those that `add_lora` adapts.
    """
    with safe_open(folder / LORA_WEIGHT_NAME_SAFE, "pt") as file:
        names, described = set(file.keys()), LORA_ADAPTER_METADATA_KEY in (file.metadata() or {})
    found = [name for name in names if name.startswith("unet.") and not name.endswith(".alpha")]
    config = unet.peft_config[ADAPTER] if described else LoraConfig(target_modules=list(TARGETS))
    layers = [n for n, _ in unet.named_modules() if check_target_module_exists(config, n)]
    needed = 2 * len(layers)
    if len(found) < needed:
        raise UserError(
            f"the policy at {folder} is not whole: {LORA_WEIGHT_NAME_SAFE} holds {len(found)} of "
            f"{needed} tensors of adapters.\n  Copy it again, or export it again: the command of "
            "the finished `fit` does"
        )
