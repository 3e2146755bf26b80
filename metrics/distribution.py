"""Compare generated with real images in one feature space: distances, floors, neighbourhoods."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rl4med_ddpo.metrics.diversity import diversity
from rl4med_ddpo.metrics.frechet import frechet_distance, frechet_estimate, moments
from rl4med_ddpo.metrics.intervals import Estimate, clustered_mean
from rl4med_ddpo.metrics.kernel import kernel_estimate
from rl4med_ddpo.metrics.neighbours import neighbourhood_scores

GROUPS = 20
"""Groups of the jackknife."""
HALVINGS = 5
NEIGHBOURS = 5


def distribution_scores(
    real: Tensor,
    fake: Tensor,
    real_lesions: NDArray[np.int64],
    real_prompts: NDArray[np.int64],
    fake_prompts: NDArray[np.int64],
    seed: int = 0,
) -> dict[str, Any]:
    """Score the fakes against the real images; the kernel distance first, for it has no bias.

    Args:
        real: Features, `(N, D)`.
        fake: Features, `(M, D)`, in an order in which the prompts are evenly or wholly sorted.
        real_lesions: Number of each real image's lesion, `(N,)`: lesions stay together where the
            images are halved, and where groups of them are left out.
        real_prompts: Number of the prompt that each real image answers, `(N,)`.
        fake_prompts: Number of each fake's prompt, `(M,)`.
        seed: Of the halvings.
    """
    groups = (torch.from_numpy(real_lesions % GROUPS), torch.arange(len(fake)) % GROUPS)
    mix = real_mix(fake_prompts, real_prompts)
    scores: dict[str, Any] = {
        "kernel": _entry(kernel_estimate(real, fake, *groups), len(real)),
        "frechet": _entry(frechet_estimate(real, fake, *groups), len(real)),
        **noise_floor(real, fake, real_lesions, seed),
    }
    if mix.sum() > 0:
        effective = {"effective_n": float(mix.sum() ** 2 / (mix**2).sum())}
        weighted = kernel_estimate(real, fake, *groups, mix)
        scores["kernel_real_mix"] = _entry(weighted, len(real)) | effective
        weighted = frechet_estimate(real, fake, *groups, mix)
        scores["frechet_real_mix"] = _entry(weighted, len(real)) | effective
    _flag_few(scores, real.shape[1])
    return (
        scores
        | neighbourhoods(real, fake, real_lesions)
        | spreads(real, fake, real_prompts, fake_prompts)
    )


def real_mix(fake_prompts: NDArray[np.int64], real_prompts: NDArray[np.int64]) -> Tensor:
    """Weigh the fakes so that their prompts are as frequent as among the real images, `(M,)`.

    It is what resampling the fakes for ever would give. Real images whose prompt has no fake
    cannot be matched; their share falls to the others.
    """
    size = int(max(fake_prompts.max(), real_prompts.max())) + 1
    wanted = np.bincount(real_prompts, minlength=size)
    there = np.bincount(fake_prompts, minlength=size).clip(min=1)
    return torch.from_numpy((wanted / there)[fake_prompts]).double()


def noise_floor(
    real: Tensor, fake: Tensor, lesions: NDArray[np.int64], seed: int
) -> dict[str, Any]:
    """Return the distance of two real halves, and that of fakes to a half at the same n.

    Both are means over halvings that keep lesions together, with the least and the greatest as
    `range`: no confidence interval. A generator that were perfect would reach the floor, not 0.
    """
    rng = np.random.default_rng(seed)
    floors, equals, sizes = [], [], []
    for _ in range(HALVINGS):
        first = halve(lesions, rng)
        one, other = real[torch.from_numpy(first)], real[torch.from_numpy(~first)]
        n = min(len(one), len(other), len(fake))
        if n < 2:
            return {}
        some = [torch.from_numpy(rng.permutation(len(x))[:n]) for x in (one, other, fake)]
        half, rest, drawn = (
            moments(x[rows]) for x, rows in zip((one, other, fake), some, strict=True)
        )
        floors.append(frechet_distance(half, rest))
        equals.append(frechet_distance(half, drawn))
        sizes.append(n)
    n = min(sizes)
    return {
        name: _entry(Estimate(float(np.mean(values)), None, n), n)
        | {"range": [min(values), max(values)], "halvings": HALVINGS}
        for name, values in (("noise_floor", floors), ("frechet_equal_n", equals))
    }


def halve(lesions: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.bool_]:
    """Pick about half of the images, whole lesions at a time, `(N,)`."""
    sizes = np.bincount(lesions)
    order = rng.permutation(len(sizes))
    chosen = order[np.cumsum(sizes[order]) <= len(lesions) / 2]
    return np.isin(lesions, chosen)


def neighbourhoods(real: Tensor, fake: Tensor, lesions: NDArray[np.int64]) -> dict[str, Any]:
    """Return precision, recall, density and coverage at equal n, which they depend on.

    The intervals resample the images that are counted, whole lesions of real ones, and take the
    other set as given.
    """
    n = min(len(real), len(fake))
    if n <= NEIGHBOURS:
        return {}
    rows = [torch.linspace(0, len(x) - 1, n).round().long() for x in (real, fake)]
    clusters = {"recall": lesions[rows[0].numpy()], "coverage": lesions[rows[0].numpy()]}
    each = neighbourhood_scores(real[rows[0]], fake[rows[1]], NEIGHBOURS)
    return {
        name: _entry(clustered_mean(values.numpy(), clusters.get(name, np.arange(n))), n)
        | {"k": NEIGHBOURS}
        for name, values in each.items()
    }


def spreads(
    real: Tensor, fake: Tensor, real_prompts: NDArray[np.int64], fake_prompts: NDArray[np.int64]
) -> dict[str, Any]:
    """Return the diversity within a prompt of the fakes, and of the real images for comparison."""
    estimate, each = diversity(fake, fake_prompts)
    of_real, _ = diversity(real, real_prompts)
    return {
        "diversity": _entry(estimate, len(fake))
        | {"prompts": {str(k): v for k, v in each.items()}},
        "diversity_real": _entry(of_real, len(real)),
    }


def _entry(estimate: Estimate, n_real: int) -> dict[str, Any]:
    interval = None if estimate.interval is None else list(estimate.interval)
    return {"value": estimate.value, "interval": interval, "n": estimate.n, "n_real": n_real}


def _flag_few(scores: dict[str, Any], dimensions: int) -> None:
    for name, entry in scores.items():
        n = min(entry["n"], entry["n_real"], entry.get("effective_n", entry["n"]))
        if not name.startswith("kernel") and n <= dimensions + 1:
            entry["flag"] = (
                f"n = {n:.0f} is no more than the {dimensions} feature dimensions and 1: the "
                "covariance is singular and the value too large; trust the kernel distance"
            )
