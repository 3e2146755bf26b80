"""The card of an exported model: what it was made of, how it scores, and what it is not for."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from huggingface_hub import ModelCard

from rl4med_ddpo.datamodules.provenance import Origin
from rl4med_ddpo.datamodules.vocabulary import Vocabulary

SCORED = ("distribution", "lpips", "copies")
"""Parts of `results/metrics.json` that are listed beside its own numbers."""
CARD_FILE = "README.md"
UNSCORED = "None yet: `rl4med-ddpo test` has not run on this model."

CARD = """\
---
{head}---

# {title}

{what}, trained by `{trained_by}` with RL4Med-DDPO in PyTorch Lightning.

- **Starts from:** `{pipeline}`
- **Data:** {data}
- **Licence of the data:** {licence}
- **Prompts:** {prompts} of them, such as "{prompt}". Other texts were not trained.

## Use

{use}

## Scores

{scores}

## Limits

- For research. Not a medical device, not for diagnosis, and not for teaching diagnosis.
- An image shows what the prompt asks for at the rate above, as read by a classifier that errs.
- The model repeats the biases of its data: who was photographed, with which devices, and how
  diseases and artifacts went together. Groups that the data hardly show were not assessed.
- Images may resemble training images. Do not treat them as anonymous, or as new evidence.

## Settings

{settings}
"""
SECTION = re.compile(r"(?<=## Scores\n\n).*?(?=\n\n## Limits)", re.DOTALL)

USE = """\
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    pipeline = StableDiffusionPipeline.from_pretrained("{opened}")
{adapters}    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline("{prompt}"{sampler}).images[0]"""
ADAPTERS = '    pipeline.load_lora_weights("FOLDER")  # this folder\n'


def model_card(
    pl_module: L.LightningModule,
    vocabulary: Vocabulary,
    origin: Origin,
    base_model: str | None,
) -> str:
    """Word the card, without scores.

    Args:
        pl_module: What was trained; its hyperparameters are told.
        vocabulary: Of the prompts.
        origin: What it was trained on.
        base_model: The hub id that it descends from; None where there is none.
    """
    settings = dict(pl_module.hparams)
    stage = type(pl_module).__name__
    adapters = settings.get("train") == "lora" and stage != "StableDiffusion"
    head = {
        "license": origin.licence.lower() or None,
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "base_model": base_model,
        "training_data": origin.data or None,
        "tags": ["stable-diffusion", "lora" if adapters else "fine-tuned"],
    }
    told = {name: value for name, value in head.items() if value is not None}
    pipeline, prompt = settings.get("pipeline", "unknown"), vocabulary.prompts[-1]
    return CARD.format(
        head=yaml.safe_dump(told, sort_keys=False, allow_unicode=True, width=1000),
        title=f"{stage}: {origin.data or 'images'}",
        what=f"{'Adapters (LoRA) for' if adapters else 'A pipeline of'} Stable Diffusion",
        trained_by=stage,
        pipeline=pipeline,
        data=origin.data or "not stated",
        licence=origin.licence or "not stated: ask who gave you the data",
        prompts=len(vocabulary.prompts),
        prompt=prompt,
        use=USE.format(
            opened=pipeline if adapters else "FOLDER",
            adapters=ADAPTERS if adapters else "",
            prompt=prompt,
            sampler=_sampler(settings),
        ),
        scores=UNSCORED,
        settings="\n".join(f"- {name}: `{value}`" for name, value in sorted(settings.items())),
    )


def with_scores(card: str, results: dict[str, Any]) -> str:
    """Return a card with the scores of `results/metrics.json` in it, and how they were drawn."""
    scores = _scores(results)
    return SECTION.sub(lambda _: scores, card)


def head_of(folder: Path) -> dict[str, Any]:
    """Return what the head of the card in a folder says; nothing if there is none."""
    path = folder / CARD_FILE
    if not path.is_file():
        return {}
    return ModelCard(path.read_text(), ignore_metadata_errors=True).data.to_dict()


def _sampler(settings: dict[str, Any]) -> str:
    names = {"steps": "num_inference_steps", "guidance": "guidance_scale", "eta": "eta"}
    return "".join(f", {names[k]}={settings[k]}" for k in names if k in settings)


def _scores(results: dict[str, Any]) -> str:
    own = {k: v for k, v in results.items() if not isinstance(v, dict)}
    listed = own | {k: results[k] for k in SCORED if results.get(k)}
    rows = [f"| {name} | {value} |" for name, value in _leaves(listed)]
    missing = [f"- {k}: not measured, {why}" for k, why in results.get("unavailable", {}).items()]
    sampler = results.get("provenance", {}).get("sampler", {})
    drawn = ", ".join(f"{k} {sampler[k]}" for k in ("steps", "guidance", "eta") if k in sampler)
    source = f"From `results/metrics.json`{f', drawn with {drawn}' if drawn else ''}:"
    table = [source, "", "| score | value |", "| --- | --- |", *rows]
    return "\n".join([*table, *([""] if missing else []), *missing])


def _leaves(scores: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield each number with its interval and n, if it has them, and the path to it as its name."""
    for name, value in scores.items():
        if isinstance(value, dict) and "value" in value:
            within = _number(value["value"], value.get("interval")) + _range(value)
            yield f"{prefix}{name}", within + (f", n = {value['n']:,}" if value.get("n") else "")
        elif isinstance(value, dict) and name != "prompts":
            yield from _leaves(value, f"{prefix}{name} ")
        elif isinstance(value, int | float):
            yield f"{prefix}{name}", _number(value, scores.get(f"{name}_interval"))


def _range(entry: dict[str, Any]) -> str:
    if not entry.get("range"):
        return ""
    low, high = entry["range"]
    return f" (least to greatest of {entry['halvings']} halvings: {low:.4g} to {high:.4g})"


def _number(value: float | None, interval: list[float] | None) -> str:
    if value is None or isinstance(value, int):
        return "not measured" if value is None else f"{value:,}"
    within = f" (95% interval {interval[0]:.4g} to {interval[1]:.4g})" if interval else ""
    return f"{value:.4g}{within}"
