"""DRaFT: its gradient, its memory, its start, its resume, and what it refuses."""

from functools import partial

import pytest
import torch

from rl4med_ddpo.foundation.errors import UserError
from rl4med_ddpo.foundation.randomness import keys
from rl4med_ddpo.lightning_modules import (
    AttributeMatch,
    AttributeProbability,
    Brightness,
)
from rl4med_ddpo.lightning_modules.pipelines.load import load_pipeline
from rl4med_ddpo.lightning_modules.policy_gradient.micro_batch import saved_bytes
from rl4med_ddpo.lightning_modules.rewards import Reward, Rewards, RewardSum
from support.command_line import draft, in_process
from support.dermoscopy import PROMPTS
from support.forked import forked, forked_ranks
from support.tiny import distance, prompts, state_of, tiny_draft
from support.tiny_runs import differing, everything
from support.trainers import quiet_trainer


@pytest.fixture
def make(tiny_pipeline, tiny_classifiers):
    return partial(tiny_draft, tiny_pipeline, tiny_classifiers)


def fit(module, folder, epochs=1, **options):
    trainer = quiet_trainer(folder, max_epochs=epochs, **options)
    trainer.fit(module, datamodule=prompts())
    return trainer


def ready(policy, **options):
    policy.configure_model()
    for name, value in options.items():
        setattr(policy.sampler, name, value)
    return policy


@pytest.mark.parametrize("train", ["lora", "full"])
def test_it_draws_what_the_policy_draws(make, train):
    policy = ready(make(train=train))
    noise_keys = keys(3, "rollout", 0, torch.arange(3))
    found = policy.sampler.draw(list(PROMPTS[:3]), noise_keys).latents
    *_, last = policy.model.trajectory(list(PROMPTS[:3]), noise_keys)
    torch.testing.assert_close(found, last.previous, rtol=0, atol=1e-6)


@pytest.mark.parametrize("last_steps", [None, 2])
def test_the_gradient_is_a_finite_difference_of_the_loss(make, last_steps):
    """Along a random direction of the weights; the truncated one sees the last steps alone."""
    policy = ready(make(train="full", last_steps=last_steps, penalty=0.7, reward=Brightness()))
    weight = dict(policy.model.unet.named_parameters())["conv_in.weight"]
    start = load_pipeline(policy.hparams.pipeline).unet
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        weight += 0.1 * weight.std() * torch.randn(weight.shape, generator=draw)
    direction = torch.randn(weight.shape, generator=draw) * weight.std()
    noise_keys, texts = keys(3, "rollout", 0, torch.arange(2)), list(PROMPTS[:2])
    policy.sampler.start = lambda: start
    schedule, first = policy.model.schedule, 4 - (last_steps or 4)

    def loss(draws):
        brightness = policy.model.decode(draws.latents).double().mean(dim=(1, 2, 3))
        return (0.7 * draws.change - brightness).sum()

    (gradient,) = torch.autograd.grad(loss(policy.sampler.draw(texts, noise_keys)), weight)

    # the states in which the change is measured, and those before the last steps, are constants
    states = [t.latents for t in policy.model.trajectory(texts, noise_keys)]
    generators = [torch.Generator().manual_seed(int(k)) for k in noise_keys]
    noises = [torch.cat([torch.randn(1, *policy.model.latent_shape, generator=g)
                         for g in generators]) for _ in range(5)][1:]  # fmt: skip
    chosen = [int(torch.randint(4 - first, (), generator=g)) + first for g in generators]
    text = policy.model.embed(texts)

    @torch.no_grad()
    def slow(moved):
        original = weight.clone()
        weight.add_(direction, alpha=moved)
        x = states[first]
        for i in range(first, 4):
            step = torch.full((2,), i)
            noise = policy.model.predict_noise(x, schedule.timesteps[step], text)
            x = schedule.mean(x, noise, step) + schedule.sigma[i] * noises[i]
        rows = torch.stack([states[i][row] for row, i in enumerate(chosen)])
        times = schedule.timesteps[torch.tensor(chosen)]
        now = policy.model.predict_noise(rows, times, text)
        trained, policy.model.unet = policy.model.unet, start
        before = policy.model.predict_noise(rows, times, text)
        policy.model.unet = trained
        weight.copy_(original)
        change = (now - before).square().mean(dim=(1, 2, 3))
        return (0.7 * change - policy.model.decode(x).double().mean(dim=(1, 2, 3))).sum().item()

    step = 1e-2
    difference = (slow(step) - slow(-step)) / (2 * step)
    assert abs(difference) > 1e-4
    assert (gradient * direction).sum().item() == pytest.approx(difference, rel=2e-2)


def test_memory_does_not_grow_with_the_steps(make):
    """The states do, which are latents; the networks' activations do not."""
    kept = {}
    for steps in (2, 8):
        policy = ready(make(steps=steps, penalty=0.0))
        noise_keys = keys(3, "rollout", 0, torch.arange(4))
        kept[steps] = saved_bytes(
            lambda p=policy, k=noise_keys: p.sampler.draw(list(PROMPTS[:4]), k).latents
        )
    one_step = saved_bytes(
        lambda: policy.sampler.follow(
            torch.zeros(4, *policy.model.latent_shape), torch.zeros(4, *policy.model.latent_shape),
            0, policy.model.embed(list(PROMPTS[:4])),
        )
    )  # fmt: skip
    assert kept[8] - kept[2] < one_step / 4


@pytest.mark.parametrize("train", ["lora", "full"])
def test_it_learns_and_its_penalty_holds_it_back(make, tmp_path, train):
    def optimizer(parameters):
        return torch.optim.AdamW(parameters, lr=5e-2 if train == "lora" else 2e-3)

    moved, reward = {}, {}
    for penalty in (0.0, 1e4):
        policy = make(
            train=train, reward=Brightness(), optimizer=optimizer, penalty=penalty, steps=2
        )
        trainer = fit(policy, tmp_path, epochs=3)
        logged = trainer.callback_metrics
        reward[penalty] = logged["reward/mean"].item()
        start = load_pipeline(policy.hparams.pipeline).unet
        x, time = torch.randn(4, *policy.model.latent_shape), torch.full((4,), 500)
        text = policy.model.embed(list(PROMPTS[:4]))
        with torch.no_grad():
            apart = policy.model.unet(x, time, text).sample - start(x, time, text).sample
        moved[penalty] = apart.norm().item()
        assert logged["reward_gradient/penalty"] >= 0
    assert reward[0.0] > reward[1e4] + 1e-4
    assert moved[1e4] < moved[0.0] / 1.5


def test_a_reward_is_trained_by_what_falls_as_it_rises(tiny_classifiers):
    images = torch.rand(6, 3, 16, 16, requires_grad=True)
    conditions = torch.randint(2, (6, 6))
    for reward in (
        AttributeMatch(tiny_classifiers["reward"], {"ink": 3.0}),
        AttributeProbability(tiny_classifiers["reward"]),
        Brightness(),
        RewardSum([AttributeProbability(tiny_classifiers["reward"]), Brightness()], [2.0, -0.5]),
    ):
        reward.load()
        loss = reward.loss(images, conditions)
        assert loss.shape == (6,)
        assert torch.autograd.grad(loss.sum(), images)[0].abs().sum() > 0
    # the last one's reward has a gradient, and that of its loss is the opposite
    (up,) = torch.autograd.grad(reward(images, conditions).value.sum(), images)
    (down,) = torch.autograd.grad(reward.loss(images, conditions).sum(), images)
    torch.testing.assert_close(up, -down)


def test_the_paper_s_reward_is_trained_by_its_network_s_cross_entropy(tiny_classifiers):
    reward = AttributeMatch(tiny_classifiers["reward"], {"hair": 3.0})
    reward.load()
    images, conditions = torch.rand(2, 3, 16, 16), torch.tensor([[1, 0, 0, 1, 0, 1], [0] * 6])
    probability = reward.network.module(images).sigmoid()
    log = torch.where(conditions.bool(), probability, 1 - probability).log()
    weights = torch.tensor([3.0, 1, 1, 1, 1, 1]) / 8
    torch.testing.assert_close(reward.loss(images, conditions), -(log * weights).sum(dim=1))


class Counted(Reward):
    def forward(self, images, conditions):
        return Rewards(images.flatten(1).gt(0.5).float().mean(dim=1), {})


@pytest.mark.parametrize("reward", [Counted(), RewardSum([Brightness(), Counted()])])
def test_a_reward_without_a_gradient_is_refused(make, reward):
    with pytest.raises(UserError, match=r"Counted defines no `loss.*AttributeMatch.*DDPO") as error:
        make(reward=reward)
    assert "Brightness defines" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"last_steps": 5}, r"last_steps=5 of 4 steps: allowed are 1 to 4"),
        ({"last_steps": 0}, r"last_steps=0: allowed is at least 1"),
        ({"penalty": -1.0}, r"penalty=-1.0: allowed is at least 0"),
        ({"micro_batch": 0}, r"micro_batch=0: allowed is at least 1"),
    ],
)
def test_what_cannot_work(make, options, says):
    with pytest.raises(UserError, match=says):
        make(**options)


def test_an_epoch_that_does_not_divide_is_refused_before_it(make, tmp_path):
    with pytest.raises(UserError, match="16 samples an epoch do not divide into 3 updates"):
        fit(make(updates=3), tmp_path)


@pytest.mark.parametrize(
    "options", [{"micro_batch": 1}, {"micro_batch": "auto"}, {"gradient_checkpointing": True}]
)
def test_how_it_is_computed_does_not_change_the_weights(make, tmp_path, options):
    def sgd(parameters):
        return torch.optim.SGD(parameters, lr=1.0)

    states = []
    for given in ({}, options):
        defaults = {"micro_batch": 8, "optimizer": sgd, "max_grad_norm": 1e9, "steps": 2}
        policy = make(**(defaults | given))
        fit(policy, tmp_path)
        states.append(state_of(policy))
    assert distance(*states) < 1e-5
    assert policy.micro_batch == (1 if options == {"micro_batch": 1} else 8)


def test_every_weight_has_a_gradient_under_bf16(make, tmp_path):
    """Steps without a gradient come first: their casts of the weights must not be taken again."""
    policy = make(train="full", last_steps=1, penalty=0.0, steps=2)
    sizes = []
    policy.on_before_optimizer_step = lambda _: sizes.extend(
        p.grad.abs().max().item() for p in policy.trained_parameters()
    )
    fit(policy, tmp_path, precision="bf16-mixed")
    assert len(sizes) == 2 * len(policy.trained_parameters())
    assert min(sizes) > 0


def test_two_processes_and_a_resume_train_the_weights_of_one(
    tiny_pipeline, tiny_classifiers, tmp_path, monkeypatch
):
    """A resume on as many processes is the unbroken run to the last bit."""
    monkeypatch.chdir(tmp_path)

    def args(name, epochs, *more):
        return draft(
            tmp_path / name, tiny_pipeline, tiny_classifiers, "--data.samples_per_epoch=8",
            "--model.micro_batch=3",
            "--model.penalty=1.0", f"--trainer.max_epochs={epochs}", *more,
        )  # fmt: skip

    two = ("--trainer.devices=2", "--trainer.strategy=ddp")
    assert forked(in_process, *args("one", 2)) == 0
    assert forked_ranks(in_process, *args("two", 2, *two)) == [0, 0]
    for epochs in (1, 2):
        assert forked(in_process, *args("broken", epochs)) == 0
    one, shared, broken = (everything(tmp_path / name) for name in ("one", "two", "broken"))
    assert differing(broken, one) == []
    weights = [found["checkpoint"]["state_dict"] for found in (one, shared)]
    assert distance(*weights) < 1e-5
    rewards = [[v for _, v in found["curves"]["reward/mean"]] for found in (one, shared)]
    assert rewards[0] == pytest.approx(rewards[1], abs=1e-6)
    assert (tmp_path / "one" / "policy" / "pytorch_lora_weights.safetensors").exists()


class Broken(Brightness):
    """Has an infinite loss for images of the second epoch's first update."""

    calls = 0

    def loss(self, images, conditions):
        self.calls += 1
        factor = float("inf") if 4 < self.calls <= 8 else 1.0
        return super().loss(images, conditions) * factor


def test_an_update_that_is_not_finite_is_skipped_and_written_down(make, tmp_path):
    policy = make(reward=Broken(), penalty=0.0, steps=2)
    with pytest.warns(
        UserWarning, match=r"(?s)loss -inf of sample .*To draw them again: .*non_finite"
    ):
        trainer = fit(policy, tmp_path, epochs=2)
    assert trainer.callback_metrics["trainer/skipped_updates"] == 1
    assert trainer.global_step == 3
    (file,) = (tmp_path / "non_finite").glob("*.pt")
    assert file.stat().st_size > 0
