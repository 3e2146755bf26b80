"""Image classification networks of timm, with or without their pretrained weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError, safe_open
from torch import nn

from rl4med_ddpo.foundation.errors import UserError, name_few
from rl4med_ddpo.lightning_modules.pipelines.hub import from_cache_or_hub

WEIGHTS = "model.safetensors"


def check_backbone(name: str, image_size: int) -> None:
    """Raise UserError if timm has no architecture of this name, or none that reads this size."""
    if not timm.is_model(name):
        close = get_close_matches(name, timm.list_models(), n=4)
        raise UserError(
            f"timm has no backbone {name!r}.\n"
            f"  Close names: {', '.join(close) or 'none'}\n"
            "  All names: python -c 'import timm; print(timm.list_models())'"
        )

    options = size_options(name, image_size)
    if not options:
        return
    try:
        with torch.device("meta"):
            timm.create_model(name, **options)(torch.zeros(2, 3, image_size, image_size))
    except (TypeError, AssertionError, RuntimeError, ValueError) as error:
        own = _fixed_size(name)
        raise UserError(
            f"the backbone {name!r} does not read images of {image_size} x {image_size}: {error}\n"
            f"  It is made for {own} x {own}: set image_size: {own}, or take a network for any "
            "size, such as efficientnet_b0"
        ) from error


def size_options(name: str, image_size: int) -> dict[str, Any]:
    """Return what builds an architecture of a fixed input size for another one; {} for others."""
    fixed = _fixed_size(name)
    return {"img_size": image_size} if fixed and fixed != image_size else {}


def _fixed_size(name: str) -> int | None:
    """Return the one size in pixels that an architecture reads unless told otherwise, if any."""
    config = timm.models.get_pretrained_cfg(name)
    return config.input_size[-1] if config and config.fixed_input_size else None


def build_backbone(
    name: str, pretrained: bool | str, outputs: int, dropout: float, image_size: int
) -> nn.Module:
    """Build a network with `outputs` logits on its own pooled features.

    Args:
        name: timm's name of the architecture.
        pretrained: True for timm's own weights, a `.safetensors` file of weights under timm's
            names, or False for random ones.
        outputs: Number of logits; this last layer is random in any case.
        dropout: Share of the pooled features dropped in training.
        image_size: Side in pixels of the images that it will read.

    Raises:
        UserError: if the pretrained weights are not available, or are another architecture's.
    """
    options = {"num_classes": outputs, "drop_rate": dropout, **size_options(name, image_size)}
    if not pretrained:
        return timm.create_model(name, **options)
    if isinstance(pretrained, str):
        _check_file(name, Path(pretrained))
    file = pretrained if isinstance(pretrained, str) else _pretrained_file(name)
    return timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay={"file": file}, **options
    )


def _check_file(name: str, file: Path) -> None:
    """Refuse what timm would load in part, the rest left random."""
    try:
        with safe_open(file, framework="pt") as weights:
            found = {key: weights.get_slice(key).get_shape() for key in weights.keys()}
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"cannot read the pretrained weights {file}: {error}.\n"
            "  Needed is a .safetensors file of weights under timm's names"
        ) from error
    with torch.device("meta"):
        network: Any = timm.create_model(name)
    last = network.pretrained_cfg["classifier"]
    last = (last,) if isinstance(last, str) else tuple(last)
    wrong = [
        key
        for key, tensor in network.state_dict().items()
        if not key.startswith(last) and found.get(key) != list(tensor.shape)
    ]
    if wrong:
        raise UserError(
            f"the weights in {file} are not those of the backbone {name!r}: {len(wrong)} tensors "
            f"are missing or of another shape, such as {name_few(wrong)}"
        )


def pretrained_repo(name: str) -> str | None:
    """Return the hub id of timm's weights for an architecture, None where there are none."""
    config = timm.models.get_pretrained_cfg(name)
    return config and config.hf_hub_id


def _pretrained_file(name: str) -> str:
    repo = pretrained_repo(name)
    if not repo:
        raise UserError(f"timm has no pretrained weights for {name!r}: set `pretrained: false`")
    return from_cache_or_hub(
        lambda local: hf_hub_download(repo, WEIGHTS, local_files_only=local),
        repo,
        None,
        f"hf download {repo} {WEIGHTS}",
        "give a file of weights as `pretrained`, or train from scratch: `pretrained: false`",
    )


@contextmanager
def batch_statistics(network: nn.Module, images: int) -> Iterator[None]:
    """Train on a batch; one of a single image, which is its own mean, is normalised by the running.

    Args:
        network: In training mode.
        images: Number of images in the batch.
    """
    norms: list[nn.Module] = []
    if images == 1:
        kinds = nn.modules.batchnorm._BatchNorm
        norms = [m for m in network.modules() if isinstance(m, kinds) and m.training]
    for norm in norms:
        norm.eval()
    try:
        yield
    finally:
        for norm in norms:
            norm.train()
