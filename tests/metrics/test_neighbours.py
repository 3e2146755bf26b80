import numpy as np
import pytest
import torch
from torch_fidelity.metric_prc import calculate_precision_recall_full

from rl4med_ddpo.metrics.neighbours import neighbourhood_scores

NAMES = ("precision", "recall", "density", "coverage")


def points(n, seed, scale=1.0, shift=0.0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(n, 4)) * scale + shift)


def means(real, fake, k=5):
    return {name: v.mean().item() for name, v in neighbourhood_scores(real, fake, k).items()}


def slow(real, fake, k):
    """The definitions, point by point."""

    def radius(all_points, i):
        return sorted(float((p - all_points[i]).norm()) for p in all_points)[k]

    def inside(point, centres, radii):
        return [float((point - c).norm()) <= r for c, r in zip(centres, radii, strict=True)]

    real_radii = [radius(real, i) for i in range(len(real))]
    fake_radii = [radius(fake, i) for i in range(len(fake))]
    balls = np.array([inside(f, real, real_radii) for f in fake])
    return {
        "precision": balls.any(axis=1).mean(),
        "recall": np.mean([any(inside(r, fake, fake_radii)) for r in real]),
        "density": balls.sum() / (k * len(fake)),
        "coverage": balls.any(axis=0).mean(),
    }


def test_agree_with_the_definitions_and_with_torch_fidelity():
    real, fake = points(50, 0), points(40, 1, 0.8, 0.3)
    found = means(real, fake, 3)
    assert found == pytest.approx(slow(real, fake, 3))
    precision, recall = calculate_precision_recall_full(fake, real, neighborhood=3)
    assert (found["precision"], found["recall"]) == pytest.approx((precision, recall), abs=1e-6)


def test_directions():
    real = points(400, 0)
    collapsed, noise = means(real, points(400, 1, 0.05)), means(real, points(400, 1, 6.0))
    alike = means(real, points(400, 1))
    assert collapsed["precision"] > 0.8
    assert collapsed["density"] > 0.8
    assert collapsed["recall"] < 0.3
    assert collapsed["coverage"] < 0.3
    assert noise["precision"] < 0.3
    assert noise["density"] < 0.3
    assert noise["recall"] > 0.8
    assert all(alike[name] > 0.8 for name in NAMES)
    same = means(real, real)
    assert same["precision"] == same["recall"] == same["coverage"] == 1


def test_too_few_points():
    with pytest.raises(ValueError, match="need more than 5 points"):
        neighbourhood_scores(points(5, 0), points(20, 1))
