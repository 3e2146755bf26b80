"""Find the runs that a report is made of, and refuse to compare what differs."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from rl4med_ddpo.datamodules.sample_tables import MANIFEST
from rl4med_ddpo.datamodules.vocabulary import DERMOSCOPY, Vocabulary
from rl4med_ddpo.foundation.errors import UserError
from rl4med_ddpo.report.results import FRONTIER, METRICS, RESULTS

TRAINED = ("SD+RL", "SD+DRaFT")
"""Models that are compared with SD, in the order of columns."""
DEPTH = 4
IGNORED_KEYS = (
    "policy", "weights", "samples_folder", "pipeline", "sampler.digest of unet", "data.root",
    "data.artifacts_csv", "judge.checkpoint", "extra", "sha256", "digest", "before_training",
)  # fmt: skip
"""What differs between runs that compare: what is compared, and where things lie."""


class Missing(Exception):
    """Something to report is not there: the message names the command that makes it."""


@dataclass
class Runs:
    """What was found.

    Attributes:
        samples: Results of SD and of what was trained from it, by model.
        folders: Where each lies.
        arms: Predictions of Table 4, by arm and seed.
        classifiers: Their results.
        frontiers: What each model measured over guidance, by model.
        files: All `results/metrics.json` that were read.
    """

    samples: dict[str, dict[str, Any]] = field(default_factory=dict)
    folders: dict[str, Path] = field(default_factory=dict)
    arms: dict[str, dict[int, pd.DataFrame]] = field(default_factory=dict)
    classifiers: dict[str, dict[str, Any]] = field(default_factory=dict)
    frontiers: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)

    @property
    def trained(self) -> tuple[str, ...]:
        """The models that were trained for a reward and scored."""
        return tuple(model for model in TRAINED if model in self.samples)

    @property
    def models(self) -> tuple[str, ...]:
        """SD, and what was trained from it."""
        return "SD", *self.trained

    @property
    def vocabulary(self) -> Vocabulary:
        """The attributes and prompts of all runs; results of before 0.2 are of dermoscopy."""
        known = (
            results.get("vocabulary")
            for results in (*self.samples.values(), *self.classifiers.values())
        )
        given = next(filter(None, known), None)
        return Vocabulary(**given) if given else DERMOSCOPY

    def samples_folder(self, model: str) -> Path:
        """Find a model's samples: in its run folder, which may have moved, or where they were."""
        scored = Path(self.samples[model]["provenance"]["samples_folder"])
        beside = self.folders[model] / scored.name
        return beside if (beside / MANIFEST).exists() else scored

    def manifest(self, model: str) -> pd.DataFrame:
        """Read the manifest of a model's samples, sorted by id."""
        folder = self.samples_folder(model)
        try:
            return pd.read_csv(folder / MANIFEST).sort_values("id", ignore_index=True)
        except OSError as error:
            raise UserError(
                f"the samples of {model} are not where they were scored: {error}.\n"
                "  Draw them again: rl4med-ddpo predict --config ddpo.yaml"
            ) from error


def find_runs(folders: Sequence[Path]) -> Runs:
    """Read every `results/metrics.json` in or below some folders.

    Raises:
        UserError: if there is none, if one cannot be read, if two have the same model or the same
            arm and seed, or if what must be equal is not.
    """
    patterns = ["*/" * depth + f"{RESULTS}/{METRICS}" for depth in range(DEPTH)]
    paths = sorted({p.resolve() for f in folders for pattern in patterns for p in f.glob(pattern)})
    if not paths:
        raise UserError(
            f"there is no {RESULTS}/{METRICS} in or below {', '.join(map(str, folders))}.\n"
            "  Score something first: rl4med-ddpo test --config ddpo.yaml"
        )
    runs, sources = Runs(files=paths), {}
    for path in paths:
        results = _read(path)
        if results["kind"] == "samples":
            key = results["model"]
            runs.samples[key], runs.folders[key] = results, path.parent.parent
            if (measured := path.with_name(FRONTIER)).exists():
                runs.frontiers[key] = json.loads(measured.read_text())
        else:
            key = f"{results['arm']}, seed {results['seed']}"
            predictions = pd.read_csv(path.with_name("predictions.csv"))
            runs.arms.setdefault(results["arm"], {})[results["seed"]] = predictions
            runs.classifiers[key] = results
        if key in sources:
            raise UserError(
                f"two runs of {key}: {sources[key].parent.parent} and {path.parent.parent}.\n"
                "  Name the runs that belong together, one of each."
            )
        sources[key] = path
    over_guidance = runs.frontiers
    runs.frontiers = {m: over_guidance[m] for m in ("SD", *TRAINED) if m in over_guidance}
    require_alike(runs.samples)
    require_same_start(runs.samples)
    require_alike(runs.classifiers)
    return runs


def require_alike(results: Mapping[str, dict[str, Any]]) -> None:
    """Refuse results that rest on different things.

    Raises:
        UserError: naming each difference with both values.
    """
    if not results:
        return
    (first, one), *others = results.items()
    for name, other in others:
        ours, theirs = (_flat(r["provenance"]) for r in (one, other))
        differing = [
            f"    {key}: {ours.get(key)} in {first}, {theirs.get(key)} in {name}"
            for key in dict.fromkeys([*ours, *theirs])
            if ours.get(key) != theirs.get(key) and not _may_differ(key)
        ]
        if differing:
            raise UserError(
                f"{first} and {name} do not rest on the same things, so their numbers do not "
                "compare:\n" + "\n".join(differing) + "\n  Score them again, alike."
            )


def require_same_start(results: Mapping[str, dict[str, Any]]) -> None:
    """Refuse an SD that is not the model which the others were trained from.

    They are compared by the U-Net's digest; where results of before 0.2 do not have it, by the
    pipeline's name.

    Raises:
        UserError: naming both.
    """
    for model in TRAINED:
        if "SD" not in results or model not in results:
            continue
        one, other = (results[name]["provenance"] for name in ("SD", model))
        # SD is scored as it is
        as_scored = one.get("sampler", {}).get("digest of unet")
        starts = [one.get("before_training", as_scored), other.get("before_training")]
        if not all(starts):
            starts = [one.get("pipeline"), other.get("pipeline")]
        if starts[0] == starts[1]:
            continue
        raise UserError(
            f"SD is not the model that {model} was trained from, so their difference is not what "
            "training did:\n"
            f"    SD: {one.get('pipeline')}, U-Net {starts[0]}\n"
            f"    {model}: started from {other.get('pipeline')}, U-Net {starts[1]}\n"
            f"  Score that one: rl4med-ddpo test with the options of {model}, --model.policy null "
            "and another --trainer.default_root_dir"
        )


def _may_differ(key: str) -> bool:
    return any(key == known or key.startswith(f"{known}.") for known in IGNORED_KEYS)


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        name: value
        for key, branch in tree.items()
        for name, value in _flat(branch, f"{prefix}.{key}" if prefix else key).items()
    }


def _read(path: Path) -> dict[str, Any]:
    try:
        results = json.loads(path.read_text())
        if results["kind"] not in ("samples", "classifier"):
            raise ValueError(f"kind {results['kind']!r}")
        _name_ranges(results)
        return results
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is no result that can be reported ({type(error).__name__}: {error}).\n"
            "  Score the run again: rl4med-ddpo test"
        ) from error


def _name_ranges(results: dict[str, Any]) -> None:
    """Call what results of before 0.2 have as the interval of halvings a range."""
    for scores in results.get("distribution", {}).values():
        for name in ("noise_floor", "frechet_equal_n"):
            entry = scores.get(name, {})
            if entry.get("interval"):
                entry |= {"range": entry["interval"], "interval": None}
