"""The six attributes of a dermoscopic image and the 32 prompts made of them, or another such set.

Everything that depends on *which* attributes exist, in which order, and how a prompt words them
stands here. A *condition* is the multi-hot vector over the attributes; a prompt and a condition say
the same thing, and an artifact that a prompt does not name must be absent from its image.

The environment variable `ATTRIBUTES` names a YAML file with another set, as
`configs/chest_xray/attributes.yaml`; it holds for the process and those that it starts.
"""

import os
import sys
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor

from rl4med_ddpo.datamodules.vocabulary import DERMOSCOPY, Vocabulary, read_vocabulary
from rl4med_ddpo.foundation.errors import UserError


def _chosen() -> Vocabulary:
    file = os.environ.get("ATTRIBUTES")
    try:
        return read_vocabulary(Path(file)) if file else DERMOSCOPY
    except UserError as error:
        # this module is imported before anything can catch an error
        print(f"\nerror: {error}", file=sys.stderr)
        sys.exit(2)


VOCABULARY = _chosen()
ARTIFACTS = VOCABULARY.any_of
DISEASES = VOCABULARY.one_of
ATTRIBUTES = ARTIFACTS + DISEASES
WORDS = VOCABULARY.words


def condition_of(disease: str | None, artifacts: tuple[str, ...] = ()) -> Tensor:
    """Return the multi-hot condition, `(6,)` float32, of a disease with some artifacts.

    Args:
        disease: None where the vocabulary has none.
        artifacts: Any of them.

    Raises:
        ValueError: if a name is unknown.
    """
    names = (disease, *artifacts)
    unknown = [n for n in artifacts if n not in ARTIFACTS]
    if disease not in (DISEASES or (None,)) or unknown:
        raise ValueError(
            f"no such attribute in {names}: a condition is one of {DISEASES} and any of {ARTIFACTS}"
        )
    return torch.tensor([float(a in names) for a in ATTRIBUTES])


def prompt_of(condition: Tensor) -> str:
    """Word a condition, `(6,)` with exactly one disease, as the prompt that asks for it.

    Raises:
        ValueError: if the condition holds both diseases or none.
    """
    present = [a for a, on in zip(ATTRIBUTES, condition.bool().tolist(), strict=True) if on]
    diseases = [a for a in present if a in DISEASES]
    if len(diseases) != min(1, len(DISEASES)):
        raise ValueError(f"a prompt names one disease of {DISEASES}, this condition {diseases}")
    artifacts = ", ".join(WORDS[a] for a in present if a in ARTIFACTS)
    template = VOCABULARY.template if artifacts else VOCABULARY.template_for_none
    return template.format(one_of="".join(WORDS[d] for d in diseases), any_of=artifacts)


def _all_conditions() -> Tensor:
    subsets = [s for size in range(len(ARTIFACTS) + 1) for s in combinations(ARTIFACTS, size)]
    return torch.stack([condition_of(d, s) for d in DISEASES or (None,) for s in subsets])


CONDITIONS = _all_conditions()
"""The 32 conditions, `(32, 6)` float32: MEL, then NV, each from the fewest artifacts on."""

PROMPTS = tuple(prompt_of(c) for c in CONDITIONS)
"""The 32 prompts, in the order of `CONDITIONS`."""


def prompt_id(prompt: str) -> int:
    """Return the row of `CONDITIONS` that a prompt asks for.

    Raises:
        ValueError: if the text is not one of the 32 prompts.
    """
    try:
        return PROMPTS.index(prompt)
    except ValueError:
        raise ValueError(
            f"not one of the {len(PROMPTS)} prompts: {prompt!r}\n"
            f"  they read like: {PROMPTS[-1]!r}\n"
            f"  or:             {PROMPTS[0]!r}"
        ) from None


def short_name(condition: Tensor) -> str:
    """Name a condition, `(6,)`, in few characters, as in `MEL+hair+ruler`."""
    present = [a for a, on in zip(ATTRIBUTES, condition.bool().tolist(), strict=True) if on]
    return "+".join(sorted(present, key=lambda a: a in ARTIFACTS)) or "none"
