"""What a reward is: a score of images against what was asked of them, with its parts."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rl4med_ddpo.foundation.errors import UserError
from rl4med_ddpo.lightning_modules.classifier import AttributeClassifier
from rl4med_ddpo.lightning_modules.prerequisites import Prerequisite


class Rewards(NamedTuple):
    """The reward of each image, `(B,)`, and what it is made of, each `(B,)`.

    Attributes:
        value: The reward.
        parts: What is worth a curve of its own.
        terms: Addends of the value, whose shares in it are logged.
    """

    value: Tensor
    parts: dict[str, Tensor]
    terms: dict[str, Tensor] = {}  # noqa: RUF012 - nobody adds to it


def joined(rewards: list[Rewards]) -> Rewards:
    """Concatenate the rewards of batches."""
    values, *named = zip(*rewards, strict=True)
    parts, terms = (
        {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
        for batches in named
    )
    return Rewards(torch.cat(values), parts, terms)


class Reward(nn.Module):
    """Scores images against conditions. Networks are loaded by `load`, not on construction."""

    def prerequisites(self) -> list[Prerequisite]:
        """Name the files without which `load` fails."""
        return []

    def load(self) -> None:
        """Load the networks; called once, before training starts."""

    def classifiers(self) -> list[AttributeClassifier]:
        """List the classifiers that the reward, or a part of it, reads with; after `load`."""
        return [part for part in self.modules() if isinstance(part, AttributeClassifier)]

    def described(self) -> str:
        """Name the reward in one line, with what decides its value besides networks."""
        return type(self).__name__

    def forward(self, images: Tensor, conditions: Tensor) -> Rewards:
        """Score images.

        Args:
            images: `(B, 3, H, W)` in [0, 1].
            conditions: What each image was asked to show, multi-hot `(B, A)`.
        """
        raise NotImplementedError

    def loss(self, images: Tensor, conditions: Tensor) -> Tensor:
        """Return what falls as the reward rises, `(B,)`, differentiable by the images.

        `DRaFT` trains by it. A reward without such a form leaves this method alone.

        Args:
            images: `(B, 3, H, W)` in [0, 1].
            conditions: What each image was asked to show, multi-hot `(B, A)`.
        """
        raise NotImplementedError

    def without_loss(self) -> list[str]:
        """Name the classes, of this reward and its parts, that have no differentiable form."""
        return [type(self).__name__] if type(self).loss is Reward.loss else []


def require_loss(reward: Reward) -> None:
    """Refuse a reward that has no differentiable form.

    Raises:
        UserError: naming the class, and what has one.
    """
    if lacking := reward.without_loss():
        raise UserError(
            f"the reward {reward.described()} has no gradient for DRaFT: {', '.join(lacking)} "
            "defines no `loss(images, conditions)`. AttributeMatch, AttributeProbability, "
            "Brightness and a RewardSum of them do; for any other take class_path: DDPO, or give "
            "the class a loss, `(B,)`, that falls as the reward rises"
        )


def scored(reward: Reward, images: Tensor, conditions: Tensor) -> Rewards:
    """Score images, and refuse a result of another form than `Rewards` has.

    Args:
        reward: Of any class.
        images: `(B, 3, H, W)` in [0, 1].
        conditions: `(B, A)`.

    Raises:
        UserError: naming the reward's class, what it returned, and what is wanted.
    """
    result: Any = reward(images, conditions)
    name, n = type(reward).__name__, len(images)
    if not isinstance(result, Rewards):
        raise UserError(_wanted(name, _form(result), n, images))
    columns = {"value": result.value}
    for field in ("parts", "terms"):
        named = getattr(result, field)
        if not isinstance(named, Mapping):
            raise UserError(_wanted(name, f"Rewards with {field}={_form(named)}", n, images))
        columns |= {f"{field}[{part!r}]": column for part, column in named.items()}
    for field, column in columns.items():
        if not _is_column(column, images):
            raise UserError(_wanted(name, f"Rewards with {field}={_form(column)}", n, images))
    return result


@torch.no_grad()
def require_form(reward: Reward, size: int, attributes: int, device: torch.device) -> None:
    """Try a reward on grey images before anything is drawn: some, and one alone.

    Args:
        reward: Of any class, loaded.
        size: Side of the images in pixels.
        attributes: A.
        device: Of the reward.

    Raises:
        UserError: see `scored`.
    """
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        for n in (3, 1):
            grey = torch.full((n, 3, size, size), 0.5, device=device)
            scored(reward, grey, torch.zeros(n, attributes, device=device))


def _is_column(column: Any, images: Tensor) -> bool:
    return (
        isinstance(column, Tensor)
        and column.shape == images.shape[:1]
        and column.is_floating_point()
        and column.device == images.device
    )


def _form(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)}, {value.dtype}, on {value.device}"
    length = f" of {len(value)}" if isinstance(value, list | tuple | dict) else ""
    return f"{type(value).__name__}{length}"


def _wanted(name: str, found: str, n: int, images: Tensor) -> str:
    return (
        f"the reward {name} returned, for {n} images: {found}.\n"
        f"  Wanted is Rewards(value, parts): value, and each entry of the dictionaries parts and "
        f"terms, a tensor ({n},), one floating-point number an image, on {images.device}. "
        "NaN marks an image that cannot be scored"
    )
