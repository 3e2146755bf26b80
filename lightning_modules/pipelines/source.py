"""Where a pipeline lies: a folder in the diffusers layout, or a repository on the hub."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import LocalEntryNotFoundError
from lightning.pytorch.utilities import rank_zero_warn
from safetensors import SafetensorError
from transformers import CLIPTextModel

from rl4med_ddpo.foundation.errors import UserError
from rl4med_ddpo.foundation.files import located
from rl4med_ddpo.lightning_modules.pipelines.hub import from_cache_or_hub

NETWORKS = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
COMPONENTS = (*NETWORKS, "tokenizer", "scheduler")
SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
CONFIGURATIONS = ("model_index.json", "*/config.json", "tokenizer/*", "scheduler/*")
WEIGHTS = ("*model.safetensors", "*model-?????-of-?????.safetensors", "*.safetensors.index.json")
WITHOUT_SAFETY_CHECKER: dict[str, Any] = {
    "safety_checker": None,
    "feature_extractor": None,
    "requires_safety_checker": False,
}
UNREADABLE = (OSError, ValueError, RuntimeError, TypeError, KeyError, SafetensorError)
_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")


def _repo_and_revision(source: str) -> tuple[str, str | None]:
    match = _HUB_ID.fullmatch(source)
    assert match, f"{source} is no hub id"
    return match[1], match[2]


def is_hub_id(source: str) -> bool:
    """Tell whether a name can only be a hub id: `owner/name[@revision]`, and nothing here."""
    a_file = source.endswith((".safetensors", ".ckpt"))
    return bool(_HUB_ID.fullmatch(source)) and not a_file and not located(source).exists()


def fetch_pipeline(source: str, networks: Iterable[str] = NETWORKS) -> Path:
    """Return the folder of a hub id in the hub's cache; fetch it if it is not whole there.

    Args:
        source: `owner/name` or `owner/name@revision`.
        networks: Components whose weights are needed too.
    """
    repo, revision = _repo_and_revision(source)
    wanted = [*CONFIGURATIONS, *(f"{n}/{file}" for n in networks for file in WEIGHTS)]

    def fetch(local_files_only: bool) -> Path:
        options = {"revision": revision, "local_files_only": local_files_only}
        if not local_files_only:
            check_kind(StableDiffusionPipeline.load_config(repo, **options), source)
        folder = Path(snapshot_download(repo, allow_patterns=wanted, **options))
        if local_files_only and _lacking(folder, networks):
            raise LocalEntryNotFoundError(f"{folder} is incomplete")
        return folder

    pinned = f" --revision {revision}" if revision else ""
    included = " ".join(f"--include '{pattern}'" for pattern in wanted)
    folder = from_cache_or_hub(
        fetch,
        repo,
        revision,
        f"hf download {repo}{pinned} {included}",
        "give the folder of a pipeline",
    )
    if revision is None:
        rank_zero_warn(f"{repo} is at commit {folder.name}; to stay there: {repo}@{folder.name}")
    return folder


def cached_commit(source: str, file: str = "model_index.json") -> str | None:
    """Return the commit of a hub id in the hub's cache, None if it is not there; asks nobody.

    Args:
        source: `owner/name` or `owner/name@revision`.
        file: One of its files.
    """
    repo, revision = _repo_and_revision(source)
    found = try_to_load_from_cache(repo, file, revision=revision)
    return Path(found).parent.name if isinstance(found, str) else None


def check_kind(index: Any, source: str | Path) -> None:
    """Refuse the `model_index.json` of another family, such as SDXL."""
    kind = index["_class_name"]
    if kind != StableDiffusionPipeline.__name__:
        raise UserError(
            f"the pipeline {source} is a {kind}; needed is a StableDiffusionPipeline, as {SD15} is"
        )


def check_folder(folder: Path) -> None:
    """Refuse a folder that is no pipeline's, or lacks a component."""
    index = folder / "model_index.json"
    if not index.is_file():
        why = "no model_index.json in it" if folder.is_dir() else "no such folder"
        raise UserError(
            f"no pipeline at {folder}: {why}.\n"
            "  Give a folder in the diffusers layout, as `rl4med-ddpo fit --config sd.yaml` "
            f"writes to runs/sd/pipeline,\n  a .safetensors file, or a hub id such as {SD15}."
        )
    missing = [name for name in COMPONENTS if not (folder / name).is_dir()]
    if missing:
        raise UserError(
            f"the pipeline at {folder} lacks {', '.join(missing)}; Stable Diffusion has "
            f"{', '.join(COMPONENTS)}, each a folder"
        )


def _lacking(folder: Path, networks: Iterable[str]) -> list[str]:
    return [name for name in COMPONENTS if not (folder / name).is_dir()] + [
        name for name in networks if not any((folder / name).glob("*.safetensors"))
    ]
