import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric

from rl4med_ddpo.metrics.distribution import distribution_scores, halve, real_mix
from rl4med_ddpo.metrics.frechet import Moments, frechet_distance, frechet_estimate, moments
from rl4med_ddpo.metrics.kernel import kernel_distance, kernel_estimate


def drawn(n, d, seed, shift=0.0, scale=1.0):
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(d, d)) / np.sqrt(d)
    return torch.from_numpy(rng.normal(size=(n, d)) @ mixing * scale + shift)


def test_gaussians_have_their_closed_form():
    """Diagonal covariances commute: the distance is a sum over dimensions."""
    rng = np.random.default_rng(0)
    m1, m2, s1, s2 = rng.uniform(0.5, 2, (4, 12))
    basis = np.linalg.qr(rng.normal(size=(12, 12)))[0]
    one, other = (
        Moments(torch.from_numpy(basis @ m), torch.from_numpy(basis * s**2 @ basis.T))
        for m, s in ((m1, s1), (m2, s2))
    )
    expected = ((m1 - m2) ** 2).sum() + ((s1 - s2) ** 2).sum()
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-9)
    assert abs(frechet_distance(one, one)) < 1e-9


def test_samples_of_gaussians_come_to_their_closed_form():
    """Whitened to exactly the wanted moments, finite samples have the exact distance."""
    raw = np.random.default_rng(1).normal(size=(500, 6))
    white = (raw - raw.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(raw.T))).T
    deviation, shift = np.array([1, 2, 0.5, 1.5, 3, 0.1]), np.arange(6) / 2
    found = frechet_distance(
        moments(torch.from_numpy(white)), moments(torch.from_numpy(white * deviation + shift))
    )
    assert found == pytest.approx((shift**2).sum() + ((deviation - 1) ** 2).sum(), rel=1e-5)


def test_frechet_agrees_with_torch_fidelity():
    real, fake = drawn(300, 20, 0), drawn(400, 20, 1, 0.3, 1.2)
    stats = [fid_features_to_statistics(x) for x in (real, fake)]
    theirs = fid_statistics_to_metric(*stats, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(moments(real), moments(fake)) == pytest.approx(theirs, rel=1e-3)


@pytest.mark.parametrize("shift", [0.0, 0.2])
def test_kernel_agrees_with_torch_fidelity_and_a_loop_over_pairs(shift):
    real, fake = drawn(60, 8, 0), drawn(60, 8, 1, shift)
    ours = kernel_distance(real, fake)
    # torch-fidelity's subsets, all of them the whole
    theirs = kid_features_to_metric(real, fake, kid_subsets=1, kid_subset_size=60, verbose=False)
    assert ours == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-3, abs=1e-9)

    def k(x, y):
        return (float(x @ y) / 8 + 1) ** 3

    def within(z):
        return np.mean([k(z[i], z[j]) for i in range(60) for j in range(60) if i != j])

    slow = within(real) + within(fake) - 2 * np.mean([k(x, y) for x in real for y in fake])
    assert ours == pytest.approx(slow, rel=1e-9, abs=1e-12)


def test_equal_sets_have_no_distance():
    real = drawn(200, 10, 0)
    assert abs(frechet_distance(moments(real), moments(real.clone()))) < 1e-6


def test_weights_are_repetitions():
    real, fake = drawn(80, 5, 0), drawn(40, 5, 1)
    times = torch.tensor([1, 2, 3, 1] * 10)
    mean = moments(fake, times.double()).mean
    torch.testing.assert_close(mean, fake.repeat_interleave(times, 0).mean(0))
    alike = torch.full((40,), 0.7, dtype=torch.float64)
    assert kernel_distance(real, fake, alike) == pytest.approx(kernel_distance(real, fake))
    torch.testing.assert_close(moments(fake, alike).covariance, fake.T.cov())


def test_scores_do_not_depend_on_the_order():
    real, fake = drawn(150, 6, 0), drawn(120, 6, 1, 0.2)
    shuffled = fake[torch.randperm(120, generator=torch.Generator().manual_seed(0))]
    one, other = (frechet_distance(moments(real), moments(x)) for x in (fake, shuffled))
    assert one == pytest.approx(other, abs=1e-10)
    assert kernel_distance(real, fake) == pytest.approx(kernel_distance(real, shuffled), abs=1e-10)


def test_distances_grow_with_the_share_of_foreign_images():
    real, same, foreign = drawn(400, 8, 0), drawn(400, 8, 1), drawn(400, 8, 2, 1.0)
    found = []
    for share in (0, 100, 200, 400):
        mixed = torch.cat([same[share:], foreign[:share]])
        found.append(
            (frechet_distance(moments(real), moments(mixed)), kernel_distance(real, mixed))
        )
    assert found == sorted(found)
    assert [kernel for _, kernel in found] == sorted(kernel for _, kernel in found)


def test_distances_grow_with_blur():
    draw = torch.Generator().manual_seed(0)
    real, same = torch.randn(2, 400, 1, 6, 6, generator=draw, dtype=torch.float64)
    found = []
    for reach in range(4):
        blurred = F.avg_pool2d(same, 2 * reach + 1, 1, reach, count_include_pad=False)
        features = real.flatten(1), blurred.flatten(1)
        found.append((frechet_distance(*map(moments, features)), kernel_distance(*features)))
    assert found == sorted(found)
    assert [kernel for _, kernel in found] == sorted(kernel for _, kernel in found)


@pytest.mark.parametrize("estimate", [frechet_estimate, kernel_estimate])
def test_intervals_hold_the_value_of_endless_samples(estimate):
    """A shift of 1 in each of 4 white dimensions; the interval covers it as often as it says."""
    truth = {frechet_estimate: 4.0}.get(estimate)
    held, widths = 0, []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        real = torch.from_numpy(rng.normal(size=(300, 4)))
        fake = torch.from_numpy(rng.normal(size=(300, 4)) + 1)
        if truth is None:
            big = np.random.default_rng(10**6)
            far = [torch.from_numpy(big.normal(size=(3000, 4)) + s) for s in (0, 1)]
            truth = kernel_distance(*far)
        groups = torch.arange(300) % 20
        low, high = estimate(real, fake, groups, groups).interval
        held += low <= truth <= high
        widths.append(high - low)
    assert held >= 34
    assert max(widths) < truth


def test_halves_keep_lesions_together():
    lesions = np.repeat(np.arange(40), np.random.default_rng(0).integers(1, 6, 40))
    first = halve(lesions, np.random.default_rng(1))
    assert not set(lesions[first]) & set(lesions[~first])
    assert 0.35 < first.mean() <= 0.5


def test_weights_give_the_fakes_the_mix_of_the_real_images():
    fake, real = np.repeat([0, 1, 2], [10, 10, 20]), np.array([0] * 30 + [2] * 10)
    weights = real_mix(fake, real)
    shares = [weights[torch.from_numpy(fake == p)].sum() / weights.sum() for p in range(3)]
    torch.testing.assert_close(torch.stack(shares), torch.tensor([0.75, 0, 0.25]).double())


def test_the_real_mix_undoes_an_uneven_prompt_mix():
    """Fakes as good as real ones, uniform over prompts that are not: only the mix is wrong."""
    rng = np.random.default_rng(0)
    real_prompts = rng.choice(4, 800, p=[0.7, 0.2, 0.06, 0.04])
    fake_prompts = np.repeat(np.arange(4), 200)
    real, fake = (
        torch.from_numpy(rng.normal(size=(800, 5)) + p[:, None] * 1.0)
        for p in (real_prompts, fake_prompts)
    )
    scores = distribution_scores(real, fake, np.arange(800), real_prompts, fake_prompts)
    floor = scores["noise_floor"]["value"]
    assert scores["frechet"]["value"] > 10 * floor
    assert scores["frechet_real_mix"]["value"] < scores["frechet"]["value"] / 10
    low, high = scores["kernel_real_mix"]["interval"]
    assert low < 0 < high
    assert scores["kernel"]["interval"][0] > 0
    low, high = scores["noise_floor"]["range"]
    assert low < floor < high
    assert scores["noise_floor"]["interval"] is scores["frechet_equal_n"]["interval"] is None
    assert scores["noise_floor"]["n"] == scores["frechet_equal_n"]["n"] >= 390


def test_too_few_images_are_flagged():
    few = distribution_scores(
        drawn(9, 8, 0), drawn(30, 8, 1), np.arange(9), np.zeros(9, int), np.zeros(30, int)
    )
    assert "trust the kernel" in few["frechet"]["flag"]
    assert "flag" not in few["kernel"]
    enough = distribution_scores(
        drawn(90, 8, 0), drawn(90, 8, 1), np.arange(90), np.zeros(90, int), np.zeros(90, int)
    )
    assert "flag" not in enough["frechet"]
