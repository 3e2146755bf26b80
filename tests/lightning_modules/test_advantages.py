import statistics

import pytest
import torch

from rl4med_ddpo.lightning_modules.policy_gradient.objective import RewardWindow, group_advantages


def k_sixths(seed, n):
    return torch.randint(7, (n,), generator=torch.Generator().manual_seed(seed)) / 6


def slow(rewards, groups, floor, clip):
    values = []
    for reward, group in zip(rewards.tolist(), groups.tolist(), strict=True):
        own = [r for r, g in zip(rewards.tolist(), groups.tolist(), strict=True) if g == group]
        value = (reward - statistics.fmean(own)) / (statistics.pstdev(own) + floor)
        values.append(max(-clip, min(clip, value)))
    return torch.tensor(values)


def test_group_advantages_against_a_slow_loop():
    rewards, groups = k_sixths(0, 64), torch.arange(64) % 8
    groups = groups[torch.randperm(64, generator=torch.Generator().manual_seed(1))]
    fast = group_advantages(rewards, groups, std_floor=0.05, clip=5.0)
    torch.testing.assert_close(fast.values, slow(rewards, groups, 0.05, 5.0), atol=1e-5, rtol=1e-5)


def test_a_flat_group_has_exactly_no_advantage():
    rewards = torch.tensor([2 / 3] * 7 + [0.0, 1.0])
    groups = torch.tensor([4] * 7 + [9, 9])
    values, flat = group_advantages(rewards, groups, std_floor=1e-6, clip=5.0)
    assert values[:7].tolist() == [0.0] * 7
    assert values[7:].tolist() == pytest.approx([-1, 1], abs=1e-5)
    assert flat == 0.5


def test_the_floor_tames_one_odd_sample_and_the_clip_bounds_it():
    rewards, groups = torch.tensor([1.0] * 63 + [5 / 6]), torch.zeros(64, dtype=torch.long)
    tamed = group_advantages(rewards, groups, std_floor=0.05, clip=5.0).values
    assert tamed[-1].item() == pytest.approx(-(63 / 64 / 6) / (0.0206697 + 0.05), rel=1e-3)
    wild = group_advantages(rewards, groups, std_floor=1e-6, clip=5.0).values
    assert wild[-1].item() == -5.0


def test_the_window_keeps_the_last_rewards_of_each_prompt():
    window = RewardWindow(size=4, minimum=2)
    groups = torch.tensor([0, 0, 0, 1, 1, 1])
    window.advantages(torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4, 0.5]), groups, 0.05, 5.0)
    window.advantages(torch.tensor([0.6, 0.7, 0.8, 0.9, 1.0, 0.0]), groups, 0.05, 5.0)
    assert window.history[0] == pytest.approx([0.2, 0.6, 0.7, 0.8])
    assert window.history[1] == pytest.approx([0.5, 0.9, 1.0, 0.0])


def test_windowed_advantages_against_a_slow_loop():
    window, kept = RewardWindow(size=8, minimum=5), {g: [] for g in range(4)}
    groups = torch.arange(12) % 4
    for epoch in range(4):
        rewards = k_sixths(epoch, 12)
        fast = window.advantages(rewards, groups, std_floor=0.05, clip=1.5)
        for group, reward in zip(groups.tolist(), rewards.tolist(), strict=True):
            kept[group] = [*kept[group], reward][-8:]
        everything = [r for own in kept.values() for r in own]
        for i, group in enumerate(groups.tolist()):
            reference = kept[group] if len(kept[group]) >= 5 else everything
            value = (rewards[i].item() - statistics.fmean(reference)) / (
                statistics.pstdev(reference) + 0.05
            )
            assert fast.values[i].item() == pytest.approx(max(-1.5, min(1.5, value)), abs=1e-5)


def test_a_window_of_equal_rewards_gives_no_advantage_at_all():
    window = RewardWindow(size=8, minimum=2)
    groups = torch.zeros(7, dtype=torch.long)
    values, flat = window.advantages(torch.full((7,), 2 / 3), groups, std_floor=1e-6, clip=5.0)
    assert values.tolist() == [0.0] * 7
    assert flat == 1.0
