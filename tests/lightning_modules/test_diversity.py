import torch

from rl4med_ddpo.lightning_modules.rewards.diversity import group_diversity


def test_against_a_slow_loop():
    draw = torch.Generator().manual_seed(0)
    features, groups = torch.rand(12, 5, generator=draw), torch.arange(12) % 3
    found = group_diversity(features, groups)
    for i in range(12):
        others = [j for j in range(12) if j != i and groups[j] == groups[i]]
        apart = [((features[i] - features[j]) ** 2).mean() ** 0.5 for j in others]
        torch.testing.assert_close(found[i], sum(apart) / len(apart))


def test_equal_images_have_none_and_the_odd_one_has_most():
    images = torch.full((5, 3, 16, 16), 0.3)
    images[4] = 0.8
    found = group_diversity(images.flatten(1), torch.zeros(5, dtype=torch.long))
    assert found[4].item() > found[0].item() > 0
    torch.testing.assert_close(found[4], torch.tensor(0.5))
    assert (
        group_diversity(images[:4].flatten(1), torch.zeros(4, dtype=torch.long)).tolist() == [0] * 4
    )


def test_a_sample_alone_in_its_group_has_none():
    assert group_diversity(torch.rand(3, 4), torch.arange(3)).tolist() == [0, 0, 0]
