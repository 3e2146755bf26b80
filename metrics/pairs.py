"""Seeded pairs of a generated image and a real one of the same subgroup, for LPIPS."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

PER_PROMPT = 1000


class Pairs(NamedTuple):
    """Rows of the pairs, and the prompts that have none for want of a real or a generated image.

    Attributes:
        fake: Row of the generated image, `(P,)`.
        real: Row of the real one, `(P,)`.
        skipped: Numbers of the prompts without a pair.
    """

    fake: NDArray[np.int64]
    real: NDArray[np.int64]
    skipped: list[int]


def draw_pairs(
    fake_prompts: NDArray[np.int64], real_prompts: NDArray[np.int64], prompts: int, seed: int = 0
) -> Pairs:
    """Pair each generated image with a real one of its subgroup, drawn with replacement.

    The paper compares 1,000 samples of each of 32 prompts; 2,493 real images, spread unevenly, and
    none at all in some subgroups, do not give 32,000 different pairs. What there is is counted.

    Args:
        fake_prompts: Number of each generated image's prompt.
        real_prompts: Number of each real image's prompt.
        prompts: How many prompts there are.
        seed: Of the draws; a prompt's pairs do not depend on other prompts.
    """
    fake, real, skipped = [], [], []
    for prompt in range(prompts):
        generated = np.flatnonzero(fake_prompts == prompt)[:PER_PROMPT]
        there = np.flatnonzero(real_prompts == prompt)
        if not len(generated) or not len(there):
            skipped.append(prompt)
            continue
        rng = np.random.default_rng([seed, prompt])
        fake.append(generated)
        real.append(rng.choice(there, len(generated)))
    none = [np.zeros(0, dtype=np.int64)]
    return Pairs(np.concatenate(fake or none), np.concatenate(real or none), skipped)
