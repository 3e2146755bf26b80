"""How well samples show what was asked for: rates, from a manifest alone."""

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from rl4med_ddpo.datamodules.describe import table_order
from rl4med_ddpo.datamodules.vocabulary import Vocabulary
from rl4med_ddpo.metrics.apr import as_asked
from rl4med_ddpo.metrics.intervals import wilson_interval


def table_2_conditions(vocabulary: Vocabulary) -> dict[str, tuple[int, ...]]:
    """Name the columns of Table 2 with their conditions: the prompts for exactly one artifact."""
    return {
        "+".join(a for a in (one, some) if a): tuple(
            int(a in (one, some)) for a in vocabulary.attributes
        )
        for one in vocabulary.one_of or (None,)
        for some in table_order(vocabulary)
        if some in vocabulary.any_of
    }


def readings(
    manifest: pd.DataFrame, reader: str, vocabulary: Vocabulary
) -> NDArray[np.bool_] | None:
    """Return which attributes a network read as present, `(N, H)`.

    Args:
        manifest: With the columns `<reader>_<attribute>` of probabilities.
        reader: `judge` (all attributes or those of `any_of`) or `reward` (all of them).
        vocabulary: The attributes.

    Returns:
        None if the manifest has no readings of this network.
    """
    every = [f"{reader}_{a}" for a in vocabulary.attributes]
    names = [name for name in every if name in manifest]
    return manifest[names].to_numpy() > 0.5 if names else None


def judged(manifest: pd.DataFrame, vocabulary: Vocabulary) -> NDArray[np.bool_]:
    """Return which attributes of `any_of` the judge read as present, `(N, 4)`, in any manifest."""
    found = readings(manifest, "judge", vocabulary)
    assert found is not None
    return found[:, : len(vocabulary.any_of)]


def reader_of_all(manifest: pd.DataFrame, vocabulary: Vocabulary) -> str | None:
    """Name who read all attributes: the judge if it can, else the reward network, else nobody."""
    for reader in ("judge", "reward"):
        found = readings(manifest, reader, vocabulary)
        if found is not None and found.shape[1] == len(vocabulary.attributes):
            return reader
    return None


def exact(
    manifest: pd.DataFrame, present: NDArray[np.bool_], vocabulary: Vocabulary
) -> NDArray[np.bool_]:
    """Tell which samples show all that was asked for and nothing else: Eq. (3), `(N,)`."""
    asked = manifest[list(vocabulary.attributes)].to_numpy()[:, : present.shape[1]] == 1
    return as_asked(present, asked)


def prompt_numbers(manifest: pd.DataFrame, vocabulary: Vocabulary) -> NDArray[np.int64]:
    """Return which of the vocabulary's prompts each sample was made for, `(N,)`."""
    numbers = {key: number for number, key in enumerate(vocabulary.keys)}
    rows = manifest[list(vocabulary.attributes)].astype(int).itertuples(index=False, name=None)
    return np.array([numbers[row] for row in rows])


def rate(hits: NDArray[np.bool_]) -> dict[str, Any]:
    """Return a share with its 95% Wilson interval, the hits and n; None where there are none."""
    n, correct = len(hits), int(hits.sum())
    if n == 0:
        return {"apr": None, "apr_interval": None, "correct": 0, "n": 0}
    interval = list(wilson_interval(correct, n))
    return {"apr": correct / n, "apr_interval": interval, "correct": correct, "n": n}


def alignment(manifest: pd.DataFrame, vocabulary: Vocabulary) -> dict[str, Any]:
    """Lay out APR over all samples, for each column of Table 2 and each prompt; APR6 likewise.

    Args:
        manifest: As `SampleFolder` writes it.
        vocabulary: The attributes and prompts.
    """
    hits = exact(manifest, judged(manifest, vocabulary), vocabulary)
    asked = prompt_numbers(manifest, vocabulary)
    columns = {
        name: asked == vocabulary.keys.index(key)
        for name, key in table_2_conditions(vocabulary).items()
    }
    result = {
        **rate(hits),
        "reward": float(manifest["reward"].mean()),
        "table_2": {name: rate(hits[rows]) for name, rows in columns.items()},
        "prompts": {
            name: {"prompt": prompt, **rate(hits[asked == number])}
            for number, (name, prompt) in enumerate(
                zip(vocabulary.names, vocabulary.prompts, strict=True)
            )
        },
    }
    if reader := reader_of_all(manifest, vocabulary):
        present = readings(manifest, reader, vocabulary)
        assert present is not None
        hits = exact(manifest, present, vocabulary)
        result["apr6"] = rate(hits) | {"read_by": reader}
    return result
