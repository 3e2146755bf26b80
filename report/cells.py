"""Numbers as a reader wants them: with their interval, and with what they prove."""

from typing import Any

import pandas as pd

from rl4med_ddpo.metrics.alignment import exact, judged
from rl4med_ddpo.metrics.intervals import is_evidence, paired_share_difference
from rl4med_ddpo.report.runs import Missing, Runs


def paired_hits(runs: Runs) -> pd.DataFrame:
    """Return for each sample whether each model drew all artifacts as asked, by model.

    Raises:
        Missing: unless all models were scored on the same prompts and noise.
    """
    vocabulary = runs.vocabulary
    manifests = {model: runs.manifest(model) for model in runs.models}
    one, *others = (table[["id", "noise_key"]] for table in manifests.values())
    if not all(one.equals(other) for other in others):
        raise Missing("from samples of the same prompts and noise: score all models alike")
    return pd.DataFrame(
        {m: exact(table, judged(table, vocabulary), vocabulary) for m, table in manifests.items()}
    )


def gain(hits: pd.DataFrame, model: str, rows: Any) -> str:
    """Word the difference of a trained model and SD over some samples, in percentage points."""
    some = hits[rows]
    if not len(some):
        return "-"
    estimate = paired_share_difference(some["SD"].to_numpy(), some[model].to_numpy())
    assert estimate.interval is not None
    low, high = (100 * bound for bound in estimate.interval)
    said = "" if is_evidence(estimate.interval) else ", no evidence"
    return f"{100 * estimate.value:+.1f} [{low:+.1f}, {high:+.1f}]{said}"


def percent(entry: dict[str, Any]) -> str:
    """Word a rate in percent with its interval."""
    if entry["apr"] is None:
        return "not estimable"
    low, high = (100 * bound for bound in entry["apr_interval"])
    return f"{100 * entry['apr']:.1f} [{low:.1f}, {high:.1f}]"


def value_cell(entry: dict[str, Any] | None, digits: int) -> str:
    """Word an entry of `metrics.json`: a 95% interval in square brackets, a range in round ones.

    `!` marks one with a flag, `-` one that is not there.
    """
    if entry is None or entry["value"] is None:
        return "-"
    text = f"{entry['value']:.{digits}f}"
    if entry.get("interval"):
        low, high = entry["interval"]
        text += f" [{low:.{digits}f}, {high:.{digits}f}]"
    elif entry.get("range"):
        low, high = entry["range"]
        text += f" ({low:.{digits}f} to {high:.{digits}f})"
    return text + (" !" if entry.get("flag") else "")


def score_cell(row: dict[str, Any], scale: float) -> str:
    """Word a score of Table 4 with its interval."""
    if pd.isna(row["value"]):
        return "not estimable"
    digits = 1 if scale > 1 else 3
    value, low, high = (scale * row[name] for name in ("value", "low", "high"))
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def gain_cell(row: dict[str, Any]) -> str:
    """Word the difference of an arm from real images alone, and what it proves."""
    if pd.isna(row.get("difference", float("nan"))):
        return "-"
    return f"{row['difference']:+.3f}, {row['verdict']}"
