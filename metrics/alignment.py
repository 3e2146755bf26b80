"""How well samples show what was asked for: rates and the leakage matrix, from a manifest alone."""

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from rl4med_ddpo.datamodules.attributes import (
    ARTIFACTS,
    ATTRIBUTES,
    CONDITIONS,
    DISEASES,
    PROMPTS,
    short_name,
)
from rl4med_ddpo.datamodules.describe import TABLE_ORDER
from rl4med_ddpo.metrics.apr import as_asked
from rl4med_ddpo.metrics.intervals import wilson_interval

KEYS = tuple(tuple(int(on) for on in condition) for condition in CONDITIONS.tolist())
TABLE_2 = {
    "+".join(a for a in (d, artifact) if a): tuple(int(a in (d, artifact)) for a in ATTRIBUTES)
    for d in DISEASES or (None,)
    for artifact in [a for a in TABLE_ORDER if a in ARTIFACTS]
}
"""The columns of Table 2, with their conditions: the prompts that ask for exactly one artifact."""


def readings(manifest: pd.DataFrame, reader: str) -> NDArray[np.bool_] | None:
    """Return which attributes a network read as present, `(N, 4)` or `(N, 6)`.

    Args:
        manifest: With the columns `<reader>_<attribute>` of probabilities.
        reader: `judge` (the four artifacts) or `reward` (all six attributes).

    Returns:
        None if the manifest has no readings of this network.
    """
    names = [f"{reader}_{a}" for a in (ARTIFACTS if reader == "judge" else ATTRIBUTES)]
    if names[0] not in manifest:
        return None
    return manifest[names].to_numpy() > 0.5


def exact(manifest: pd.DataFrame, present: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Tell which samples show all that was asked for and nothing else: Eq. (3), `(N,)`."""
    asked = manifest[list(ATTRIBUTES)].to_numpy()[:, : present.shape[1]] == 1
    return as_asked(present, asked)


def prompt_numbers(manifest: pd.DataFrame) -> NDArray[np.int64]:
    """Return the row of `CONDITIONS` that each sample was made for, `(N,)`."""
    rows = manifest[list(ATTRIBUTES)].astype(int).itertuples(index=False, name=None)
    return np.array([KEYS.index(row) for row in rows])


def rate(hits: NDArray[np.bool_]) -> dict[str, Any]:
    """Return a share with its 95% Wilson interval, the hits and n; None where there are none."""
    n, correct = len(hits), int(hits.sum())
    if n == 0:
        return {"apr": None, "apr_interval": None, "correct": 0, "n": 0}
    interval = list(wilson_interval(correct, n))
    return {"apr": correct / n, "apr_interval": interval, "correct": correct, "n": n}


def alignment(manifest: pd.DataFrame) -> dict[str, Any]:
    """Lay out APR over all samples, for each column of Table 2 and each prompt; APR6 likewise.

    Args:
        manifest: As `SampleFolder` writes it.
    """
    hits = exact(manifest, readings(manifest, "judge"))
    asked = prompt_numbers(manifest)
    columns = {name: asked == KEYS.index(key) for name, key in TABLE_2.items()}
    result = {
        **rate(hits),
        "reward": float(manifest["reward"].mean()),
        "table_2": {name: rate(hits[rows]) for name, rows in columns.items()},
        "prompts": {
            short_name(condition): {"prompt": prompt, **rate(hits[asked == number])}
            for number, (condition, prompt) in enumerate(zip(CONDITIONS, PROMPTS, strict=True))
        },
    }
    of_reward = readings(manifest, "reward")
    if of_reward is not None:
        result["apr6"] = rate(exact(manifest, of_reward))
    return result


def leakage(manifest: pd.DataFrame) -> pd.DataFrame:
    """Return the share of each prompt's samples that show each attribute: 32 rows, 6 columns.

    The judge reads the artifacts, the reward network the diseases, which the judge cannot. Where a
    prompt asks for an attribute the share should be 1, elsewhere 0: what is there leaked in. NaN
    where there is no sample or no reader.
    """
    shown = pd.DataFrame(np.nan, index=manifest.index, columns=list(ATTRIBUTES))
    shown[list(ARTIFACTS)] = readings(manifest, "judge").astype(float)
    of_reward = readings(manifest, "reward")
    if of_reward is not None and DISEASES:
        shown[list(DISEASES)] = of_reward[:, len(ARTIFACTS) :].astype(float)
    by_prompt = shown.groupby(prompt_numbers(manifest)).mean().reindex(range(len(CONDITIONS)))
    return by_prompt.set_axis([short_name(c) for c in CONDITIONS]).rename_axis("prompt")
