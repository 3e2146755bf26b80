"""Image classification networks of timm, with or without their pretrained weights."""

from difflib import get_close_matches

import timm
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import nn

from datamodules.errors import UserError

WEIGHTS = "model.safetensors"
TIMEOUT = 10.0


def check_backbone(name: str) -> None:
    """Raise UserError if timm has no architecture of this name; offline, in no time."""
    if not timm.is_model(name):
        close = get_close_matches(name, timm.list_models(), n=4)
        raise UserError(
            f"timm has no backbone {name!r}.\n"
            f"  Close names: {', '.join(close) or 'none'}\n"
            "  All names: python -c 'import timm; print(timm.list_models())'"
        )


def build_backbone(name: str, pretrained: bool, outputs: int, dropout: float) -> nn.Module:
    """Build a network with `outputs` logits on its own pooled features.

    Raises:
        UserError: if the pretrained weights are neither in the hub's cache nor to be had.
    """
    options = {"num_classes": outputs, "drop_rate": dropout}
    if pretrained:
        options["pretrained_cfg_overlay"] = {"file": _pretrained_file(name)}
    return timm.create_model(name, pretrained=pretrained, **options)


def _pretrained_file(name: str) -> str:
    repo = timm.models.get_pretrained_cfg(name).hf_hub_id
    if not repo:
        raise UserError(f"timm has no pretrained weights for {name!r}: set `pretrained: false`")
    try:
        return hf_hub_download(repo, WEIGHTS, local_files_only=True)
    except LocalEntryNotFoundError:
        pass
    try:
        # a download repeats itself for most of a minute before it gives up, this asks once
        HfApi().model_info(repo, timeout=TIMEOUT)
        return hf_hub_download(repo, WEIGHTS)
    except Exception as error:
        raise UserError(
            f"the pretrained weights of the backbone {name!r} are not on this machine and could "
            f"not be fetched ({type(error).__name__}: {error}).\n"
            f"  Fetch them where there is a network: hf download {repo} {WEIGHTS}\n"
            "  and set HF_HOME to that cache here, or train from scratch: `pretrained: false`"
        ) from error
