import math

import pytest
import torch
from torch import nn

from rl4med_ddpo.foundation.errors import UserError
from rl4med_ddpo.lightning_modules.classifier import load_classifier
from rl4med_ddpo.lightning_modules.policy_gradient.scorer import require_independent
from rl4med_ddpo.lightning_modules.rewards.attributes import (
    AttributeMatch,
    AttributeProbability,
    attribute_match,
)
from rl4med_ddpo.lightning_modules.rewards.base import Reward, Rewards, require_form
from rl4med_ddpo.lightning_modules.rewards.brightness import Brightness
from rl4med_ddpo.lightning_modules.rewards.reward_sum import RewardSum
from support.dermoscopy import ARTIFACTS, ATTRIBUTES, CONDITIONS


class Reader(nn.Module):
    """Says the same of every image."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(torch.as_tensor(logits))
        self.attributes = ATTRIBUTES

    def forward(self, images):
        return self.logits.expand(len(images), -1)


def reward_of(logits, conditions, kind=AttributeMatch, **options):
    reward = kind(**options)
    reward.read_with(Reader(logits))
    return reward(torch.rand(len(conditions), 3, 8, 8), conditions)


def test_the_reward_is_the_share_of_six():
    conditions = CONDITIONS[[0, 5, 15, 16, 31]]
    scored = reward_of([2.0, -2.0, 1.0, -1.0, 3.0, -3.0], conditions)
    says = [1, 0, 1, 0, 1, 0]
    for i, condition in enumerate(conditions.tolist()):
        hits = [c == s for c, s in zip(condition, says, strict=True)]
        assert scored.value[i].item() == pytest.approx(sum(hits) / 6)
        assert [scored.parts[a][i].item() for a in ATTRIBUTES] == hits


def test_every_value_is_a_multiple_of_a_sixth():
    logits = torch.randn(4096, 6, generator=torch.Generator().manual_seed(0))
    match = attribute_match(logits, CONDITIONS[torch.arange(4096) % 32]).float().mean(dim=1)
    assert torch.equal((match * 6).round() / 6, match)
    assert sorted(set((match * 6).round().int().tolist())) == [0, 1, 2, 3, 4, 5, 6]


def test_an_artifact_free_image_of_the_right_disease_earns_two_thirds():
    melanoma, nevus = [-9.0] * 4 + [9.0, -9.0], [-9.0] * 4 + [-9.0, 9.0]
    earned = torch.cat(
        [reward_of(melanoma, CONDITIONS[:16]).value, reward_of(nevus, CONDITIONS[16:]).value]
    )
    assert earned.mean().item() == pytest.approx(2 / 3)


def test_a_logit_of_zero_is_no_attribute():
    assert attribute_match(torch.zeros(1, 6), torch.zeros(1, 6)).all()
    assert not attribute_match(torch.zeros(1, 6), torch.ones(1, 6)).any()


def test_the_network_reads_in_float32_and_stays_out_of_checkpoints(tiny_classifiers):
    reward = AttributeMatch(tiny_classifiers["reward"])
    assert list(reward.parameters()) == []
    reward.load()
    reward.train()
    assert reward.state_dict() == {}
    assert not any(p.requires_grad for p in reward.parameters())
    assert not any(module.training for module in reward.network.modules())
    images = torch.rand(32, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    plain = reward.network.module(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = reward(images.bfloat16().float(), CONDITIONS)
        assert torch.equal(reward.network(images), plain)
    assert half.value.dtype == torch.float32


def test_the_judge_is_refused_as_reward_network(tiny_classifiers):
    with pytest.raises(UserError, match="other heads than needed") as error:
        AttributeMatch(tiny_classifiers["judge"]).load()
    assert ", ".join(ARTIFACTS) in str(error.value)


def test_the_reward_network_is_needed():
    (need,) = AttributeMatch("runs/x.ckpt").prerequisites()
    assert need.path == "runs/x.ckpt"
    assert need.command == "rl4med-ddpo fit --config classifier.yaml"


def test_brightness():
    images = torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4), torch.full((3, 4, 4), 0.25)])
    assert Brightness()(images, CONDITIONS[:3]).value.tolist() == [0, 1, 0.25]
    assert Brightness().prerequisites() == []


LOGITS = [2.0, -2.0, 0.5, -0.1, 3.0, -3.0]


def test_the_soft_reward_is_the_mean_probability_of_what_was_asked():
    conditions = CONDITIONS[[0, 5, 15, 16, 31]]
    scored = reward_of(LOGITS, conditions, AttributeProbability)
    for i, condition in enumerate(conditions.tolist()):
        says = [1 / (1 + math.exp(-x)) for x in LOGITS]
        asked = [p if c else 1 - p for p, c in zip(says, condition, strict=True)]
        assert scored.value[i].item() == pytest.approx(sum(asked) / 6)
        assert [scored.parts[a][i].item() for a in ATTRIBUTES] == pytest.approx(asked)


@pytest.mark.parametrize("kind", [AttributeMatch, AttributeProbability])
def test_weighted_attributes(kind):
    weights = {"ink": 3.0, "NV": 0.0}
    scored = reward_of(LOGITS, CONDITIONS, kind, weights=weights)
    plain = reward_of(LOGITS, CONDITIONS, kind)
    expected = sum(weights.get(a, 1.0) * plain.parts[a] for a in ATTRIBUTES) / 7
    torch.testing.assert_close(scored.value, expected)
    torch.testing.assert_close(sum(scored.terms.values()), scored.value)
    assert scored.terms["NV"].abs().max() == 0


@pytest.mark.parametrize("weights", [{"inc": 1.0}, {"ink": -1.0}, dict.fromkeys(ATTRIBUTES, 0.0)])
def test_weights_of_no_attribute_or_of_none_are_refused(weights):
    with pytest.raises(UserError, match="name attributes among hair, gel_bubble"):
        reward_of(LOGITS, CONDITIONS, weights=weights)


def test_a_sum_of_rewards_and_the_share_of_each(tiny_classifiers):
    one = AttributeMatch(tiny_classifiers["reward"])
    whole = RewardSum([one, Brightness()], weights=[0.5, 2.0])
    assert [need.path for need in whole.prerequisites()] == [tiny_classifiers["reward"]]
    whole.load()
    assert whole.state_dict() == {}
    images = torch.rand(32, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    scored = whole(images, CONDITIONS)
    hits, light = one(images, CONDITIONS).value, images.mean(dim=(1, 2, 3))
    torch.testing.assert_close(scored.value, 0.5 * hits + 2 * light)
    torch.testing.assert_close(scored.parts["2_Brightness/value"], light)
    assert "1_AttributeMatch/hair" in scored.parts
    torch.testing.assert_close(scored.terms["1_AttributeMatch"], 0.5 * hits)
    torch.testing.assert_close(scored.terms["2_Brightness"], 2 * light)


def test_a_sum_wants_a_weight_for_each():
    with pytest.raises(UserError, match="2 rewards and 1 weights"):
        RewardSum([Brightness(), Brightness()], weights=[1.0])
    with pytest.raises(UserError, match="0 rewards"):
        RewardSum([])


class Returned(Reward):
    """Returns what it is told to, made of as many numbers as there are images."""

    def __init__(self, form):
        super().__init__()
        self.form = form

    def forward(self, images, conditions):
        return self.form(images.mean(dim=(1, 2, 3)))


WRONG = {
    "a tensor (3,), torch.float32": lambda x: x,
    "list of 3": lambda x: x.tolist(),
    "dict of 1": lambda x: {"value": x},
    "value=a tensor (3, 1)": lambda x: Rewards(x[:, None], {}),
    "value=a tensor (1,), torch.float32": lambda x: Rewards(x[:1], {}),
    "value=a tensor ()": lambda x: Rewards(x.mean(), {}),
    "value=float": lambda x: Rewards(0.5, {}),
    "value=a tensor (3,), torch.int64": lambda x: Rewards((x > 0).long(), {}),
    "on meta": lambda x: Rewards(x.to("meta"), {}),
    "terms=NoneType": lambda x: Rewards(x, {}, None),
    "parts['light']=a tensor (3, 1)": lambda x: Rewards(x, {"light": x[:, None]}),
    "for 1 images: Rewards with value=a tensor ()": lambda x: Rewards(x.squeeze(), {}),
}


@pytest.mark.parametrize("found", WRONG)
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_result_of_another_form_is_named_with_the_form_wanted(found, wrapped):
    reward = Returned(WRONG[found])
    with pytest.raises(UserError) as error:
        require_form(RewardSum([reward]) if wrapped else reward, 8, 6, torch.device("cpu"))
    assert found in str(error.value)
    assert "the reward Returned returned" in str(error.value)
    assert "(3,), one" in str(error.value) or "(1,), one" in str(error.value)


@pytest.mark.parametrize("number", [float("nan"), 0.5])
def test_a_number_an_image_is_accepted_and_nothing_is_drawn_from_the_global_stream(number):
    reward = Returned(lambda x: Rewards(torch.full_like(x, number) + 0 * torch.rand(len(x)), {}))
    state = torch.random.get_rng_state()
    require_form(reward, 8, 6, torch.device("cpu"))
    assert torch.equal(torch.random.get_rng_state(), state)


class Own(Reward):
    """A reward of one's own that has a classifier in its own way."""

    def __init__(self, path):
        super().__init__()
        self.reader = load_classifier(path)

    def forward(self, images, conditions):
        return Rewards(self.reader(images).mean(dim=1), {})


def test_what_a_reward_reads_with_is_asked_of_every_part(tiny_classifiers):
    match = AttributeMatch(tiny_classifiers["reward"], weights={"ink": 3})
    whole = RewardSum([Brightness(), RewardSum([match])], weights=[0.5, 2])
    assert whole.classifiers() == []
    whole.load()
    assert whole.classifiers() == [match.network.module]
    named = "RewardSum(0.5 Brightness + 2 RewardSum(1 AttributeMatch(ink=3)))"
    assert whole.described() == named
    judge = load_classifier(tiny_classifiers["judge"])
    require_independent(judge, whole, "judge.ckpt")
    for judged in (Own(tiny_classifiers["judge"]), nn.Sequential(judge.network)):
        reward = RewardSum([match, judged])
        with pytest.raises(UserError, match=r"the judge judge.ckpt has 100% of its weights"):
            require_independent(judge, reward, "judge.ckpt")
