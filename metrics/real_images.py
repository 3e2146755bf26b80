"""What the judge makes of real images, by subgroup and source: the ceiling of any generator."""

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from rl4med_ddpo.datamodules.vocabulary import Vocabulary
from rl4med_ddpo.metrics.alignment import exact, prompt_numbers, rate

FEW = 30


def real_rates(
    rows: pd.DataFrame, vocabulary: Vocabulary, present: NDArray[np.bool_]
) -> dict[str, Any]:
    """Score real images as if their labels were their prompts.

    Labels of artifacts are another network's guesses, wrong now and then; where the judge finds an
    artifact that its label denies, one of the two is wrong. `absent` says how often it agrees that
    an artifact is absent: no sample can be held to a higher standard.

    Args:
        rows: Of the joined table, with the attributes and `source`.
        vocabulary: The attributes and prompts.
        present: What the judge read, `(N, H)`.

    Returns:
        The rate over all; over each of the `prompts`, with `flag` where n is 0 or below 30;
        over each `source`; and `present` and `absent` for each artifact.
    """
    numbers, several = prompt_numbers(rows, vocabulary), vocabulary.any_of
    present = present[:, : len(several)]
    hits = exact(rows, present, vocabulary)
    sources = rows["source"].replace("", "unknown").to_numpy()
    labels = rows[list(several)].to_numpy() == 1
    return {
        **rate(hits),
        "prompts": {
            name: flagged(rate(hits[numbers == i])) for i, name in enumerate(vocabulary.names)
        },
        "sources": {s: flagged(rate(hits[sources == s])) for s in sorted(set(sources))},
        "present": {a: flagged(rate(present[labels[:, i], i])) for i, a in enumerate(several)},
        "absent": {a: flagged(rate(~present[~labels[:, i], i])) for i, a in enumerate(several)},
    }


def flagged(entry: dict[str, Any]) -> dict[str, Any]:
    """Add what a reader must know about a small n."""
    n = entry["n"]
    if n >= FEW:
        return entry
    return entry | {"flag": "not estimable" if n == 0 else f"n < {FEW}"}
