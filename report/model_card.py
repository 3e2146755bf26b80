"""The card of an exported model: what it was made of, how it scores, and what it is not for."""

from collections.abc import Iterator
from typing import Any

import lightning as L

from rl4med_ddpo.datamodules.vocabulary import Vocabulary

SCORED = ("distribution", "lpips", "copies")
"""Parts of `results/metrics.json` that are listed beside its own numbers."""

CARD = """\
---
{licence_line}library_name: diffusers
pipeline_tag: text-to-image
base_model: {base}
tags: [stable-diffusion, {kind}]
---

# {title}

{what}, trained by `{trained_by}` with RL4Med-DDPO in PyTorch Lightning.

- **Starts from:** {base}
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

USE_LORA = """\
    from diffusers import StableDiffusionPipeline
    pipeline = StableDiffusionPipeline.from_pretrained("{base}")
    pipeline.load_lora_weights("FOLDER")  # this folder
    pipeline("{prompt}").images[0]"""
USE_PIPELINE = """\
    from diffusers import StableDiffusionPipeline
    pipeline = StableDiffusionPipeline.from_pretrained("FOLDER")  # this folder
    pipeline("{prompt}").images[0]"""


def model_card(
    pl_module: L.LightningModule, vocabulary: Vocabulary, results: dict[str, Any] | None
) -> str:
    """Word the card.

    Args:
        pl_module: What was trained; its hyperparameters `pipeline` and `train` are told.
        vocabulary: Of the data.
        results: What `test` wrote to `results/metrics.json`; None where it has not run.
    """
    settings = dict(pl_module.hparams)
    lora = settings.get("train") == "lora"
    stage = type(pl_module).__name__
    base, prompt = settings.get("pipeline", "unknown"), vocabulary.prompts[-1]
    adapters = lora and stage != "StableDiffusion"
    licence = vocabulary.licence or "not stated: ask who gave you the data"
    return CARD.format(
        licence_line=f"license: {vocabulary.licence.lower()}\n" if vocabulary.licence else "",
        base=base,
        kind="lora" if adapters else "fine-tuned",
        title=f"{vocabulary.data or 'Images'}: {stage}",
        what=f"{'Adapters (LoRA) for' if adapters else 'A pipeline of'} Stable Diffusion",
        trained_by=stage,
        data=vocabulary.data or "not stated",
        licence=licence,
        prompts=len(vocabulary.prompts),
        prompt=prompt,
        use=(USE_LORA if adapters else USE_PIPELINE).format(base=base, prompt=prompt),
        scores=_scores(results),
        settings="\n".join(f"- {name}: `{value}`" for name, value in sorted(settings.items())),
    )


def _scores(results: dict[str, Any] | None) -> str:
    if results is None:
        return "None yet: `rl4med-ddpo test` has not run on this model."
    own = {k: v for k, v in results.items() if not isinstance(v, dict)}
    listed = own | {k: results[k] for k in SCORED if results.get(k)}
    rows = [f"| {name} | {value} |" for name, value in _leaves(listed)]
    missing = [f"- {k}: not measured, {why}" for k, why in results.get("unavailable", {}).items()]
    table = ["From `results/metrics.json`:", "", "| score | value |", "| --- | --- |", *rows]
    return "\n".join([*table, *([""] if missing else []), *missing])


def _leaves(scores: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield each number with its interval and n, if it has them, and the path to it as its name."""
    for name, value in scores.items():
        if isinstance(value, dict) and "value" in value:
            n = f", n = {value['n']:,}" if value.get("n") else ""
            yield (
                f"{prefix}{name}",
                _number(value["value"], value.get("interval")) + _range(value) + n,
            )
        elif isinstance(value, dict) and name != "prompts":
            yield from _leaves(value, f"{prefix}{name} ")
        elif isinstance(value, int | float):
            yield f"{prefix}{name}", _number(value, scores.get(f"{name}_interval"))


def _range(entry: dict[str, Any]) -> str:
    if not entry.get("range"):
        return ""
    low, high = entry["range"]
    return f" ({low:.4g} to {high:.4g} in {entry.get('halvings', 5)} halvings)"


def _number(value: float | None, interval: list[float] | None) -> str:
    if value is None or isinstance(value, int):
        return "not measured" if value is None else f"{value:,}"
    within = f" (95% interval {interval[0]:.4g} to {interval[1]:.4g})" if interval else ""
    return f"{value:.4g}{within}"
