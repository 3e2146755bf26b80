"""Which attributes images have and how prompts word them: dermoscopy's, or any other set's.

A *condition* is the multi-hot vector over the attributes. A prompt and a condition say the same
thing, and an attribute of `any_of` that a prompt does not name must be absent from its image.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from string import Formatter
from typing import Any

import torch
from torch import Tensor

from rl4med_ddpo.foundation.errors import UserError

MOST = 8
"""Attributes of `any_of`: their subsets double with each one, and each subset is a prompt."""


@dataclass(frozen=True)
class Vocabulary:
    """A set of attributes and its prompts.

    Args:
        any_of: Attributes of which an image may show any; the judge reads these.
        one_of: Attributes of which every image shows exactly one; may be empty.
        words: How a prompt calls each of them.
        template: The prompt, with `{any_of}`, and `{one_of}` if there are any.
        template_for_none: The prompt of an image that shows none of `any_of`.
        data: Name of the data, for the card of an exported model.
        licence: Under which the data may be used, for the card too.

    Raises:
        UserError: if prompts cannot be made of it.
    """

    any_of: tuple[str, ...]
    one_of: tuple[str, ...] = ()
    words: dict[str, str] = field(default_factory=dict)
    template: str = ""
    template_for_none: str = ""
    data: str = ""
    licence: str = ""

    def __post_init__(self) -> None:
        for name in ("any_of", "one_of"):
            object.__setattr__(self, name, tuple(map(str, getattr(self, name) or ())))
        if wrong := _mistakes(self):
            raise UserError("no prompts can be made of the vocabulary: " + "; ".join(wrong))

    @property
    def attributes(self) -> tuple[str, ...]:
        """All attributes in the order of a condition, A of them."""
        return self.any_of + self.one_of

    @cached_property
    def conditions(self) -> Tensor:
        """Every condition, `(P, A)` float32: for each of `one_of`, from the fewest others on."""
        subsets = [
            s for size in range(len(self.any_of) + 1) for s in combinations(self.any_of, size)
        ]
        return torch.stack([self.condition_of(one, s) for one in self._ones for s in subsets])

    @cached_property
    def keys(self) -> tuple[tuple[int, ...], ...]:
        """Every condition as 0 and 1, in the order of `conditions`."""
        return tuple(tuple(int(on) for on in condition) for condition in self.conditions.tolist())

    @cached_property
    def prompts(self) -> tuple[str, ...]:
        """Every prompt, in the order of `conditions`; 32 of dermoscopy."""
        return tuple(map(self.prompt_of, self.conditions))

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Short names of all prompts, in the order of `conditions`."""
        return tuple(map(self.short_name, self.conditions))

    @property
    def _ones(self) -> tuple[str | None, ...]:
        return self.one_of or (None,)

    def condition_of(self, one: str | None, several: Sequence[str] = ()) -> Tensor:
        """Return the multi-hot condition, `(A,)` float32.

        Args:
            one: Of `one_of`; None where there are none.
            several: Some of `any_of`.

        Raises:
            ValueError: if a name is unknown.
        """
        names = (one, *several)
        if one not in self._ones or set(several) - set(self.any_of):
            raise ValueError(
                f"no such attribute in {names}: a condition is one of {self.one_of} and any of "
                f"{self.any_of}"
            )
        return torch.tensor([float(a in names) for a in self.attributes])

    def present(self, condition: Tensor) -> list[str]:
        """Name the attributes that a condition, `(A,)`, holds."""
        return [a for a, on in zip(self.attributes, condition.tolist(), strict=True) if on]

    def prompt_of(self, condition: Tensor) -> str:
        """Word a condition, `(A,)` with exactly one of `one_of`, as the prompt that asks for it.

        Raises:
            ValueError: if the condition holds several of `one_of`, or none.
        """
        present = self.present(condition)
        ones = [a for a in present if a in self.one_of]
        if len(ones) != min(1, len(self.one_of)):
            raise ValueError(f"a prompt names one of {self.one_of}, this condition {ones}")
        several = ", ".join(self.words[a] for a in present if a in self.any_of)
        template = self.template if several else self.template_for_none
        return template.format(one_of="".join(self.words[a] for a in ones), any_of=several)

    def prompt_id(self, prompt: str) -> int:
        """Return the row of `conditions` that a prompt asks for.

        Raises:
            ValueError: if the text is not one of the prompts.
        """
        try:
            return self.prompts.index(prompt)
        except ValueError:
            raise ValueError(
                f"not one of the {len(self.prompts)} prompts: {prompt!r}\n"
                f"  they read like: {self.prompts[-1]!r}\n"
                f"  or:             {self.prompts[0]!r}"
            ) from None

    def short_name(self, condition: Tensor) -> str:
        """Name a condition, `(A,)`, in few characters, as in `MEL+hair+ruler`."""
        present = sorted(self.present(condition), key=lambda a: a in self.any_of)
        return "+".join(present) or "none"

    def caption(self, condition: Tensor) -> str:
        """Word a condition, `(A,)`, for below an image, as in `MEL: hair, gel bubble`."""
        present = self.present(condition)
        several = ", ".join(self.words[a] for a in present if a in self.any_of)
        ones = "".join(f"{a}: " for a in present if a in self.one_of)
        return f"{ones}{several or 'no artifacts'}"

    def word(self, attribute: str) -> str:
        """Return an attribute's words without the part in brackets."""
        return self.words[attribute].partition(" (")[0]


def _mistakes(vocabulary: Vocabulary) -> list[str]:
    names = vocabulary.attributes
    wrong = []
    if not vocabulary.any_of:
        wrong.append("any_of needs at least one attribute")
    if len(set(names)) < len(names) or not all(name.isidentifier() for name in names):
        wrong.append("attributes must differ, and be made of letters, digits and underscores")
    if len(vocabulary.any_of) > MOST or len(vocabulary.one_of) == 1:
        wrong.append(f"any_of may have {MOST} attributes, one_of none or at least two")
    without = [name for name in names if not vocabulary.words.get(name)]
    if without:
        wrong.append(f"words lacks {', '.join(without)}")
    one_of = {"one_of"} if vocabulary.one_of else set()
    for name, needed in (("template", {"any_of"} | one_of), ("template_for_none", one_of)):
        found = _places(getattr(vocabulary, name))
        if found != needed:
            places = " and ".join(f"{{{p}}}" for p in sorted(needed)) or "no braces"
            wrong.append(f"{name} must have {places}, it is {getattr(vocabulary, name)!r}")
    return wrong


def _places(template: Any) -> set[str | None]:
    try:
        return {place for _, place, _, _ in Formatter().parse(template) if place is not None}
    except (ValueError, TypeError):
        return {None}


DERMOSCOPY = Vocabulary(
    any_of=("hair", "gel_bubble", "ruler", "ink"),
    one_of=("MEL", "NV"),
    words={
        "hair": "hair",
        "gel_bubble": "gel bubble",
        "ruler": "ruler",
        "ink": "ink",
        "MEL": "melanoma (MEL)",
        "NV": "melanocytic nevus (NV)",
    },
    template="a dermoscopic image with {one_of} showing {any_of}",
    template_for_none="a dermoscopic image with {one_of} with no visible artifacts",
    data="ISIC 2019 (HAM10000, BCN_20000, MSK), dermoscopy of melanomas and nevi",
    licence="CC-BY-NC-4.0",
)
"""The paper's: six attributes, 32 prompts."""
