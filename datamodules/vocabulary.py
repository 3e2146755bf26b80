"""Which attributes images have and how prompts word them: dermoscopy's, or any other set's."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from string import Formatter
from typing import Any

import yaml

from rl4med_ddpo.foundation.errors import UserError

MOST = 8
"""Attributes of `any_of`: their subsets double with each one, and each subset is a prompt."""


@dataclass(frozen=True)
class Vocabulary:
    """A set of attributes and its prompts.

    Attributes:
        any_of: Attributes of which an image may show any; the judge reads these.
        one_of: Attributes of which every image shows exactly one; may be empty.
        words: How a prompt calls each of them.
        template: The prompt, with `{any_of}`, and `{one_of}` if there are any.
        template_for_none: The prompt of an image that shows none of `any_of`.
        data: Name of the data, for the card of an exported model.
        licence: Under which the data may be used, for the card too.
    """

    any_of: tuple[str, ...]
    one_of: tuple[str, ...] = ()
    words: dict[str, str] = field(default_factory=dict)
    template: str = ""
    template_for_none: str = ""
    data: str = ""
    licence: str = ""


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


def read_vocabulary(path: Path) -> Vocabulary:
    """Read a YAML file with the fields of a `Vocabulary`.

    Raises:
        UserError: if the file is missing or says something that prompts cannot be made of.
    """
    try:
        given = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read the attributes {path}: {error}") from error
    known = [f.name for f in fields(Vocabulary)]
    if not isinstance(given, dict) or set(given) - set(known) or not given.get("any_of"):
        raise UserError(
            f"{path} is no set of attributes. It needs any_of, words, template and "
            f"template_for_none; allowed are {', '.join(known)}."
        )
    lists = {name: tuple(map(str, given.get(name) or ())) for name in ("any_of", "one_of")}
    vocabulary = Vocabulary(**{**given, **lists})
    wrong = _mistakes(vocabulary)
    if wrong:
        raise UserError(f"{path}: " + "; ".join(wrong))
    return vocabulary


def _mistakes(vocabulary: Vocabulary) -> list[str]:
    names = vocabulary.any_of + vocabulary.one_of
    wrong = []
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
