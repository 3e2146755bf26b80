import math

import pytest
import torch

from rl4med_ddpo.foundation.errors import UserError
from rl4med_ddpo.lightning_modules.policy_gradient.objective import (
    clipped_policy_loss,
    divergence_limited_loss,
    equal_weights,
    require_no_divergence,
    require_unit_ratio,
)

CLIP = 0.1
# log ratio, advantage: both signs, inside the range and beyond either end
CASES = [(d, a) for d in (-0.5, -0.05, 0.0, 0.05, 0.5) for a in (-2.0, -0.5, 0.0, 1.0, 3.0)]


def evaluate():
    old = torch.linspace(-3, 3, len(CASES))
    new = (old + torch.tensor([d for d, _ in CASES])).requires_grad_()
    return new, clipped_policy_loss(new, old, torch.tensor([a for _, a in CASES]), (CLIP, CLIP))


def test_loss_against_a_slow_scalar_loop():
    _, fast = evaluate()
    for i, (d, advantage) in enumerate(CASES):
        ratio = math.exp(d)
        loss = max(-advantage * ratio, -advantage * min(max(ratio, 1 - CLIP), 1 + CLIP))
        assert fast.loss[i].item() == pytest.approx(loss, abs=1e-6)
        assert fast.ratio[i].item() == pytest.approx(ratio, rel=1e-5)
        assert fast.sampling_kl[i].item() == pytest.approx(ratio - 1 - d, abs=1e-6)


def test_the_gradient_is_zero_exactly_where_the_clip_holds():
    new, fast = evaluate()
    fast.loss.sum().backward()
    for i, (d, advantage) in enumerate(CASES):
        # too far in the direction that the advantage asks for
        beyond = (math.exp(d) > 1 + CLIP and advantage > 0) or (
            math.exp(d) < 1 - CLIP and advantage < 0
        )
        assert bool(fast.clipped[i]) is beyond
        assert (new.grad[i].item() == 0) is (beyond or advantage == 0)


def test_a_pair_is_dropped_only_where_it_is_too_far_and_would_go_on():
    cases = [(d, a, kl) for d in (-0.5, 0.0, 0.5) for a in (-1.0, 0.0, 2.0) for kl in (0.1, 0.3)]
    new = torch.tensor([d for d, *_ in cases], requires_grad=True)
    advantage, kl = (torch.tensor(column) for column in list(zip(*cases, strict=True))[1:])
    found = divergence_limited_loss(new, torch.zeros(len(cases)), advantage, kl, max_kl=0.2)
    found.loss.sum().backward()
    for i, (d, a, far) in enumerate(cases):
        onward = (d > 0 and a > 0) or (d < 0 and a < 0)
        assert bool(found.clipped[i]) is (far > 0.2 and onward)
        expected = 0.0 if far > 0.2 and onward else -a * math.exp(d)
        assert new.grad[i].item() == pytest.approx(expected)
        assert found.loss[i].item() == pytest.approx(-a * math.exp(d))


def test_rounding_that_max_kl_would_take_for_a_change_is_refused():
    require_no_divergence(1e-7, 1e-6, "32-true")
    for kl in (1e-6, float("nan")):
        with pytest.raises(UserError, match="bf16-mixed is too low for it"):
            require_no_divergence(kl, 1e-6, "bf16-mixed")


def test_equal_weights_have_mean_one_over_the_trained_steps_and_even_them_out():
    sensitivity = torch.tensor([0.5, 1.0, 4.0, 8.0])
    weights = equal_weights(sensitivity, (1, 4))
    assert weights.tolist() == pytest.approx([0, 24 / 11, 6 / 11, 3 / 11])
    assert torch.equal(equal_weights(torch.full((3,), 7.0), (0, 3)), torch.ones(3))


def test_the_unclipped_gradient_is_equation_2():
    """-E[ p / p_old * A * grad log p ], for a policy whose density autograd differentiates."""
    mean = torch.tensor(0.3, requires_grad=True)
    actions, advantage = torch.linspace(-1, 1, 9), torch.linspace(-2, 3, 9)
    old = torch.distributions.Normal(0.29, 1.0).log_prob(actions)
    new = torch.distributions.Normal(mean, 1.0).log_prob(actions)
    loss = clipped_policy_loss(new, old, advantage, clip_range=(10.0, 10.0)).loss.mean()
    (ours,) = torch.autograd.grad(loss, mean)
    # d log N(x; m, 1) / dm = x - m
    ratio = torch.exp(((actions - 0.29) ** 2 - (actions - 0.3) ** 2) / 2)
    expected = -(ratio * advantage * (actions - 0.3)).mean()
    assert ours.item() == pytest.approx(expected.item(), rel=1e-4)


def test_at_a_ratio_of_one_the_gradient_flows():
    """On-policy both branches tie; half a gradient, or none, would train slowly and silently."""
    new = torch.tensor([-1.0, -1.0], requires_grad=True)
    clipped_policy_loss(
        new, new.detach(), torch.tensor([2.0, -3.0]), (1e-4, 1e-4)
    ).loss.sum().backward()
    assert new.grad.tolist() == [-2.0, 3.0]


@pytest.mark.parametrize("deviation", [1e-4, 0.5, math.nan, math.inf])
def test_a_ratio_off_one_is_refused(deviation):
    with pytest.raises(UserError, match=r"clip range 0\.0001 .* bf16-mixed is too low"):
        require_unit_ratio(deviation, 1e-4, "bf16-mixed")


def test_a_ratio_near_one_passes():
    require_unit_ratio(9e-5, 1e-4, "32-true")


def test_an_asymmetric_clip_holds_each_side_at_its_own():
    log_ratios = torch.tensor([-0.3, -0.15, 0.15, 0.3], requires_grad=True)
    for advantage, live in ((1.0, [True, True, True, False]), (-1.0, [False, True, True, True])):
        weights = torch.full((4,), advantage)
        result = clipped_policy_loss(log_ratios, torch.zeros(4), weights, (0.2, 0.25))
        (gradient,) = torch.autograd.grad(result.loss.sum(), log_ratios)
        assert [value != 0 for value in gradient.tolist()] == live
        assert [not clipped for clipped in result.clipped.tolist()] == live
