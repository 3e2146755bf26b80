import numpy as np
import torch
from torchvision.transforms.v2.functional import gaussian_blur

from rl4med_ddpo.datamodules.augmentation import distort


def picture() -> torch.Tensor:
    return torch.rand(3, 24, 24, generator=torch.Generator().manual_seed(0))


def test_the_generator_decides():
    first, again, other = (distort(picture(), np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_images_stay_images():
    for seed in range(20):
        image = distort(picture(), np.random.default_rng(seed))
        assert image.shape == (3, 24, 24)
        assert image.dtype == torch.float32
        assert image.min() >= 0
        assert image.max() <= 1


def test_some_lose_detail_and_some_do_not():
    edges = torch.stack(
        [
            distort(picture(), np.random.default_rng(seed)).diff(dim=2).abs().mean()
            for seed in range(40)
        ]
    )
    sharp = picture().diff(dim=2).abs().mean()
    blurred = gaussian_blur(picture(), [5, 5], [1.0]).diff(dim=2).abs().mean()
    assert edges.min() < blurred * 1.3
    assert edges.max() > sharp * 0.7


def test_tints_and_contrasts_differ():
    images = torch.stack([distort(picture(), np.random.default_rng(seed)) for seed in range(40)])
    means = images.mean(dim=(2, 3)) / picture().mean(dim=(1, 2))
    assert 0.84 < means.min() < 0.9
    assert 1.1 < means.max() < 1.16
