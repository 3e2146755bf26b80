"""What `predict` draws: images as they are saved, with what the networks read in them."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Samples:
    """Images drawn for some prompts. The scores are those of the eight-bit images.

    Attributes:
        prompts: B texts.
        names: Short names of the prompts.
        conditions: What they ask for, multi-hot `(B, A)`.
        index: Global sample indices, `(B,)` int64.
        noise_keys: What decided the noise, besides the policy, `(B,)` int64.
        images: `(B, 3, H, W)` uint8.
        reward: `(B,)`.
        reward_logits: What the reward's network read, `(B, A)`; None if it has no network.
        judge_logits: What the judge read, `(B, H)`.
    """

    prompts: list[str]
    names: list[str]
    conditions: Tensor
    index: Tensor
    noise_keys: Tensor
    images: Tensor
    reward: Tensor
    reward_logits: Tensor | None
    judge_logits: Tensor

    def select(self, rows: Sequence[int]) -> "Samples":
        """Return some of the samples."""
        tensors = {name: v[list(rows)] for name, v in vars(self).items() if isinstance(v, Tensor)}
        reward_logits = tensors.pop("reward_logits", None)
        prompts, names = ([texts[row] for row in rows] for texts in (self.prompts, self.names))
        return Samples(prompts=prompts, names=names, reward_logits=reward_logits, **tensors)


def filled_rows(n: int, multiple: int) -> list[int]:
    """Return the rows 0 to n - 1, the last one repeated until their number is a multiple.

    A network's kernels round differently for another batch size (by 1e-6, enough to turn a pixel);
    for the same size a row does not depend on its neighbours in a batch.
    """
    return [*range(n), *[n - 1] * (-n % multiple)]
