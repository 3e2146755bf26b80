import pytest
import torch

from rl4med_ddpo.foundation.errors import UserError
from rl4med_ddpo.lightning_modules.policy_gradient.rollout import (
    chosen_steps,
    plan_passes,
    require_divisible,
)

LIVE = {
    "all": torch.ones(6, 3),
    "none": torch.zeros(6, 3),
    "one rank idle": torch.tensor([[1.0, 0.0, -2.0]]).repeat(6, 1),
    "uneven": torch.tensor(
        [[1.0, 0, 0], [0, 0, 0], [2, -1, 0], [0.5, 0, 3], [1, 0, 0], [-1, 1, 0]]
    ),
}


@pytest.mark.parametrize("advantages", LIVE.values(), ids=LIVE)
@pytest.mark.parametrize("micro_batch", [1, 4, 5, 7, 100])
def test_ranks_pass_equally_often_over_exactly_the_live_pairs(advantages, micro_batch):
    steps = chosen_steps(torch.arange(6), (0, 10), 4, (42, 0, 0))
    planned = [plan_passes(advantages, rank, steps, micro_batch) for rank in range(3)]
    assert len({len(passes) for passes in planned}) == 1
    for rank, passes in enumerate(planned):
        assert all(1 <= len(pairs.row) <= micro_batch for pairs in passes)
        weighted = [
            (row, step, value)
            for pairs in passes
            for row, step, value in zip(*(c.tolist() for c in pairs), strict=True)
            if value
        ]
        live = [
            (row, step, advantages[row, rank].item())
            for row in range(6)
            for step in steps[row].tolist()
            if advantages[row, rank]
        ]
        assert sorted(weighted) == sorted(live)


def test_no_more_passes_than_needed():
    steps = chosen_steps(torch.arange(6), (0, 10), 4, (42, 0, 0))
    assert len(plan_passes(LIVE["uneven"], 1, steps, 4)) == 5
    assert len(plan_passes(LIVE["none"], 1, steps, 4)) == 1
    idle = sum(len(p.row) for p in plan_passes(LIVE["one rank idle"], 1, steps, 4))
    assert idle == 6


def test_steps_are_drawn_without_replacement_for_each_sample_anew():
    steps = chosen_steps(torch.tensor([5, 9, 5]), (0, 50), 20, (42, 3, 0))
    assert steps.shape == (3, 20)
    assert all(len(set(row)) == 20 and max(row) < 50 for row in steps.tolist())
    assert torch.equal(steps[0], steps[2])
    assert not torch.equal(steps[0], steps[1])
    others = [(43, 3, 0), (42, 4, 0), (42, 3, 1)]
    redrawn = (chosen_steps(torch.tensor([5, 9, 5]), (0, 50), 20, seeds) for seeds in others)
    assert not any(torch.equal(steps, again) for again in redrawn)
    whole = chosen_steps(torch.tensor([5]), (0, 50), 50, (42, 3, 0))
    assert sorted(whole[0].tolist()) == list(range(50))


def test_steps_come_from_the_window_alone():
    steps = chosen_steps(torch.arange(40), (3, 7), 2, (42, 0, 0))
    assert set(steps.flatten().tolist()) == {3, 4, 5, 6}


@pytest.mark.parametrize(
    ("samples", "updates", "ranks", "nearest"), [(256, 3, 2, "252 and 258"), (2, 2, 4, "8")]
)
def test_samples_that_do_not_divide_are_refused_with_the_nearest_that_do(
    samples, updates, ranks, nearest
):
    with pytest.raises(UserError) as error:
        require_divisible(samples, updates, ranks)
    said = str(error.value)
    assert f"{samples} samples" in said
    assert f"multiple of {updates * ranks}" in said
    assert said.endswith(f"the nearest are {nearest}")
    require_divisible(256, 2, 4)
