import numpy as np
import pytest
import torch

from rl4med_ddpo.metrics.frontier import (
    Scored,
    best_guidance,
    distance_to_real,
    frontier_point,
    right_diversity,
)

NAMES = ("plain", "hair", "ink", "never asked for")


@pytest.fixture
def images():
    """Of 30: ten a prompt, of which 8, 3 and 4 are right; the wrong ones lie far away."""
    hits = np.zeros(30, dtype=bool)
    for prompt, right in enumerate((8, 3, 4)):
        hits[10 * prompt : 10 * prompt + right] = True
    features = torch.randn(30, 5, generator=torch.Generator().manual_seed(0))
    features[~torch.from_numpy(hits)] *= 100
    return Scored(hits, np.arange(30) // 10, features)


def test_diversity_is_that_of_the_right_ones_and_names_who_has_too_few(images):
    found = right_diversity(images, NAMES)
    slow = []
    for first, last in ((0, 8), (20, 24)):
        rows = images.features[first:last].double()
        pairs = [(a - b).norm().item() for i, a in enumerate(rows) for b in rows[:i]]
        slow.append(sum(pairs) / len(pairs))
    assert found["value"] == pytest.approx(sum(slow) / 2)
    assert found["left_out"] == ["hair"]
    assert found["n"] == 12


def test_without_any_right_image_there_is_no_diversity(images):
    found = right_diversity(images._replace(hits=np.zeros(30, dtype=bool)), NAMES)
    assert found["value"] is None
    assert found["left_out"] == list(NAMES[:3])


def test_a_point_names_the_worst_prompts(images):
    point = frontier_point(images, {"value": 1.0}, NAMES)
    assert point["apr"] == 0.5
    assert point["prompts"] == {"plain": 0.8, "hair": 0.3, "ink": 0.4}
    assert next(iter(point["worst_prompts"].items())) == ("hair", 0.3)


def test_the_distance_to_other_images_of_the_same_kind_is_within_its_interval_of_0():
    draw = torch.Generator().manual_seed(1)
    one, other, far = (torch.randn(400, 4, generator=draw) + shift for shift in (0, 0, 1))
    none = np.zeros(400, dtype=np.int64)
    near, away = (
        distance_to_real(Scored(none > 0, none, x), one, torch.arange(400)) for x in (other, far)
    )
    assert near["interval"][0] < 0 < near["interval"][1] < away["interval"][0]


def test_the_best_guidance_is_that_of_validation_and_the_lowest_of_equals():
    points = [
        {"guidance": 7.5, "val_apr": 0.8, "apr": 0.9},
        {"guidance": 5.0, "val_apr": 0.8, "apr": 0.7},
        {"guidance": 3.0, "val_apr": 0.7, "apr": 1.0},
    ]
    assert best_guidance(points) == 5.0
