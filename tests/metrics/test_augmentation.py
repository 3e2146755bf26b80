"""Table 4's statistics: the scores themselves, and how often they cry wolf (E12)."""

import numpy as np
import pandas as pd
import pytest
import torch
from torchmetrics.functional.classification import binary_accuracy, binary_auroc, binary_f1_score

from rl4med_ddpo.metrics.augmentation import SCORES, accuracy, auroc, compare, f1, table_4

THEIRS = {f1: binary_f1_score, accuracy: binary_accuracy, auroc: binary_auroc}


def images(rng, lesions=170):
    """Test images of lesions with one to three views: label, lesion, and what makes them hard."""
    clusters = np.repeat(np.arange(lesions), rng.integers(1, 4, lesions))
    truth = (rng.random(lesions) < 0.35)[clusters]
    return truth, clusters, rng.normal(size=lesions)[clusters]


def classifier(rng, truth, hard, skill):
    """One training run: its own luck for the whole, and its own mistakes."""
    luck = rng.normal(scale=0.15)
    logit = (2 * truth - 1) * (skill + luck) + 0.8 * hard + rng.normal(size=len(truth))
    return 1 / (1 + np.exp(-logit))


@pytest.mark.parametrize("formula", list(THEIRS))
def test_scores_are_those_of_torchmetrics_under_repetition(formula):
    rng = np.random.default_rng(0)
    truth = rng.random(60) < 0.4
    said = rng.random(60).round(1)
    weights = rng.integers(0, 3, (4, 60)).astype(float)
    found = formula(truth, said, weights)
    for row, value in zip(weights.astype(int), found, strict=True):
        repeated = [torch.from_numpy(np.repeat(x, row)) for x in (said, truth.astype(int))]
        assert value == pytest.approx(THEIRS[formula](*repeated).item(), abs=1e-6)


def simulate(seed, gain):
    """Compare an arm of three runs with the reference by F1, as Table 4 does."""
    rng = np.random.default_rng(seed)
    truth, clusters, hard = images(rng)
    arm = [classifier(rng, truth, hard, 1.6 + gain) for _ in range(3)]
    reference = [classifier(rng, truth, hard, 1.6) for _ in range(3)]
    return compare(arm, reference, truth, clusters, "f1", draws=300)


def test_a_planted_null_is_rarely_significant_and_a_planted_effect_mostly():
    null = [simulate(seed, 0.0).p < 0.05 for seed in range(100)]
    effect = [simulate(seed, 1.2) for seed in range(100)]
    assert sum(null) <= 5
    assert sum(g.p < 0.05 and g.difference > 0 for g in effect) >= 80


def predictions(rng, skills, seeds=3):
    truth, clusters, hard = images(rng, lesions=120)
    frame = pd.DataFrame(
        {"id": np.arange(len(truth)), "lesion_id": [f"L_{c}" for c in clusters], "hair": truth * 1}
    )
    return {
        arm: {s: frame.assign(p_hair=classifier(rng, truth, hard, skill)) for s in range(seeds)}
        for arm, skill in skills.items()
    }


def test_the_table_says_no_evidence_where_there_is_none():
    table = table_4(
        predictions(np.random.default_rng(3), {"real": 1.5, "oversampling": 1.5, "sd_rl": 4.0}),
        ["hair"],
    )
    assert len(table) == 3 * len(SCORES)
    by = table.set_index(["score", "arm"])
    for score in SCORES:
        assert by.loc[(score, "oversampling"), "verdict"] == "no evidence"
        assert by.loc[(score, "sd_rl"), "verdict"] == "better"
        assert by.loc[(score, "sd_rl"), "p_holm"] >= by.loc[(score, "sd_rl"), "p"]
        assert by.loc[(score, "real"), "verdict"] == ""
    assert by.loc[("accuracy", "sd_rl"), "mcnemar"] < 0.001
    assert (table["low"] <= table["value"]).all()
    assert (table["value"] <= table["high"]).all()


def test_an_interval_over_lesions_is_wider_than_one_over_images():
    rng = np.random.default_rng(0)
    truth, clusters, hard = images(rng)
    runs = [classifier(rng, truth, 3 * hard, 1.0)] * 2
    lesions = compare(runs, runs, truth, clusters, "accuracy")
    single = compare(runs, runs, truth, np.arange(len(truth)), "accuracy")
    width = [g.interval[1] - g.interval[0] for g in (lesions, single)]
    assert width[0] > 1.1 * width[1]
    assert lesions.difference == 0
    assert lesions.p == 1
