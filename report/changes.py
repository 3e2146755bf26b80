"""What training changed, for better and for worse: a paragraph made from the numbers."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from rl4med_ddpo.metrics.alignment import prompt_numbers, reader_of_all, readings
from rl4med_ddpo.metrics.intervals import is_evidence, paired_share_difference
from rl4med_ddpo.report.cells import paired_hits
from rl4med_ddpo.report.runs import Runs

SIGN = {
    "kernel": ("kernel distance", -1),
    "kernel_real_mix": ("kernel distance at the real mix", -1),
    "precision": ("precision", 1),
    "recall": ("recall", 1),
    "density": ("density", 1),
    "coverage": ("coverage", 1),
}
"""Scores against real images, by name in the results: what they are called, and which way is up."""


class Change(NamedTuple):
    """A score that moved by more than its interval.

    Attributes:
        what: Its name.
        before: Of SD.
        after: Of the trained model.
        better: Whether it moved the right way.
    """

    what: str
    before: float
    after: float
    better: bool

    def __str__(self) -> str:
        return f"{self.what} {self.before:.3f} to {self.after:.3f}"


def changes_paragraph(runs: Runs, model: str) -> str:
    """Word what training raised, what it lowered, and which prompts fell.

    Args:
        runs: Of SD and the model.
        model: That was trained, such as SD+RL.

    Raises:
        Missing: unless all models were scored on the same prompts and noise.
    """
    hits = paired_hits(runs)
    found = [*_alignment(hits, model), *_beside_real(runs, model), *_attributes(runs, model)]
    better = ", ".join(str(c) for c in found if c.better) or "nothing"
    worse = ", ".join(str(c) for c in found if not c.better) or "nothing"
    fallen = ", ".join(map(str, _fallen_prompts(runs, hits, model))) or "none"
    return (
        f"What training changed, from SD to {model} at the same guidance and on the same noise, "
        f"where it is more than the 95% interval. **Better:** {better}. **Worse:** {worse}. "
        f"**Prompts whose APR fell:** {fallen}."
    )


def _alignment(hits: pd.DataFrame, model: str) -> Iterator[Change]:
    yield from _shares("APR", hits["SD"].to_numpy(), hits[model].to_numpy(), more_is_better=True)


def _beside_real(runs: Runs, model: str) -> Iterator[Change]:
    """Compare the distances to real images in the judge's features; intervals that do not meet."""
    before, after = (_distances(runs.samples[name]) for name in ("SD", model))
    for name, (said, sign) in SIGN.items():
        one, other = before.get(name), after.get(name)
        if not (one and other and one.get("interval") and other.get("interval")):
            continue
        rose = other["interval"][0] > one["interval"][1]
        if rose or other["interval"][1] < one["interval"][0]:
            yield Change(said, one["value"], other["value"], rose == (sign > 0))


def _attributes(runs: Runs, model: str) -> Iterator[Change]:
    """Compare how often each attribute is shown where it is asked for, and where it is not."""
    vocabulary = runs.vocabulary
    tables = [runs.manifest(name) for name in ("SD", model)]
    judges = {reader_of_all(table, vocabulary) for table in tables}
    shown = [found for t in tables if (found := readings(t, "judge", vocabulary)) is not None]
    heads = vocabulary.attributes if judges == {"judge"} else vocabulary.any_of
    for column, attribute in enumerate(heads):
        asked = tables[0][attribute].to_numpy() == 1
        before, after = (present[:, column] for present in shown)
        word = vocabulary.word(attribute)
        yield from _shares(f"{word} where asked for", before[asked], after[asked], True)
        yield from _shares(f"{word} where not asked for", before[~asked], after[~asked], False)


def _fallen_prompts(runs: Runs, hits: pd.DataFrame, model: str) -> Iterator[Change]:
    numbers = prompt_numbers(runs.manifest("SD"), runs.vocabulary)
    for number, name in enumerate(runs.vocabulary.names):
        some = hits[numbers == number]
        for change in _shares(name, some["SD"].to_numpy(), some[model].to_numpy(), True):
            if not change.better:
                yield change


def _shares(
    what: str, before: NDArray[np.bool_], after: NDArray[np.bool_], more_is_better: bool
) -> Iterator[Change]:
    if not len(before):
        return
    estimate = paired_share_difference(before, after)
    if is_evidence(estimate.interval):
        better = (estimate.value > 0) == more_is_better
        yield Change(what, float(before.mean()), float(after.mean()), better)


def _distances(results: dict[str, Any]) -> dict[str, Any]:
    return results.get("distribution", {}).get("classifier", {})
