import copy
import math
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.distributions import Normal, kl_divergence

from rl4med_ddpo.foundation.errors import UserError
from rl4med_ddpo.foundation.progress import progress
from rl4med_ddpo.foundation.randomness import keys
from rl4med_ddpo.lightning_modules import DDPO, Brightness
from rl4med_ddpo.lightning_modules.pipelines.load import load_pipeline
from rl4med_ddpo.lightning_modules.policy_gradient.objective import Advantages
from rl4med_ddpo.lightning_modules.policy_gradient.rollout import chosen_steps
from rl4med_ddpo.lightning_modules.rewards.diversity import group_diversity
from support.dermoscopy import ARTIFACTS, CONDITIONS, PROMPTS, prompt_id
from support.tiny import RecordedDDPO, distance, flat, prompts, state_of, tiny_ddpo
from support.trainers import quiet_trainer


def fit(module, folder, data=None, epochs=1, **options):
    trainer = quiet_trainer(folder, max_epochs=epochs, **options)
    trainer.fit(module, datamodule=data or prompts())
    return trainer


@pytest.fixture
def make(tiny_pipeline, tiny_classifiers):
    return partial(tiny_ddpo, tiny_pipeline, tiny_classifiers)


def slow_transition(policy, unet, prompt, x, i):
    """Mean and deviation of a transition by the paper's formula, one network run at a time."""
    scheduler = policy.model.noise_scheduler
    times = scheduler.timesteps
    unconditional, noise = (
        unet(x, times[i], policy.model.embed([text])).sample for text in ("", prompt)
    )
    if policy.hparams.guidance_in_training:
        noise = unconditional + policy.hparams.guidance * (noise - unconditional)
    alphas = scheduler.alphas_cumprod
    # the last step ends at the first training timestep
    a, a_p = alphas[times[i]], alphas[times[i + 1] if i + 1 < len(times) else 0]
    s = ((1 - a_p) / (1 - a) * (1 - a / a_p)).sqrt()
    origin = (x - (1 - a).sqrt() * noise) / a.sqrt()
    return a_p.sqrt() * origin + (1 - a_p - s**2).sqrt() * noise, s


def slow_step_weights(policy):
    """1 / c of each step of the window, by autograd, so that their mean is 1; all 1 by default."""
    if policy.hparams.step_weights == "none":
        return torch.ones(4)
    x, inverse = torch.randn(1, 4, 8, 8), {}
    for i in range(*policy.window_of_steps):
        noise = torch.randn(1, 4, 8, 8, requires_grad=True)
        mean, s = slow_transition(policy, lambda *_, noise=noise: Output(noise), "", x, i)
        (by_noise,) = torch.autograd.grad(mean[0, 0, 0, 0], noise)
        inverse[i] = s / by_noise[0, 0, 0, 0].abs()
    return {i: w / torch.stack(list(inverse.values())).mean() for i, w in inverse.items()}


class Output(NamedTuple):
    sample: torch.Tensor


def slow_gradient(policy, rollout, rows, steps, advantages, weights, first_weights):
    """Eq. 2 within its trust region, pair by pair: no batch, no shared code but the U-Net."""
    step_weights, sampling = slow_step_weights(policy), copy.deepcopy(policy.model.unet)
    trained = [p for p in sampling.parameters() if p.requires_grad]
    for p, weight in zip(trained, first_weights, strict=True):
        p.data.copy_(weight)
    for p, weight in zip(policy.trained_parameters(), weights, strict=True):
        p.data.copy_(weight)
    policy.zero_grad()
    base = load_pipeline(policy.hparams.pipeline).unet
    below, above = policy.clip_range
    for row, chosen, advantage in zip(rows, steps, advantages, strict=True):
        for i in chosen:
            x, action = rollout.latents[row, i][None], rollout.latents[row, i + 1][None]
            prompt = rollout.prompts[row]
            mean, s = slow_transition(policy, policy.model.unet, prompt, x, i)
            log_prob = Normal(mean, s).log_prob(action).mean()
            ratio = (log_prob - rollout.log_probs[row, i]).exp()
            clipped = ratio.clamp(1 - below, 1 + above)
            loss = torch.max(-advantage * ratio, -advantage * clipped)
            if policy.hparams.trust_region == "kl":
                old, _ = slow_transition(policy, sampling, prompt, x, i)
                moved = kl_divergence(Normal(mean, s), Normal(old, s)).mean()
                onward = advantage * (ratio - 1) > 0
                dropped = onward and moved > policy.hparams.max_kl
                loss = 0 * ratio if dropped else -advantage * ratio
            loss = loss * step_weights[i]
            if policy.hparams.kl_weight:
                reference, _ = slow_transition(policy, base, prompt, x, i)
                apart = kl_divergence(Normal(mean, s), Normal(reference, s)).mean()
                loss = loss + policy.hparams.kl_weight * apart
            (loss / (len(rows) * len(chosen))).backward()
    return flat([p.grad for p in policy.trained_parameters()])


LOSSES = {
    "lora": {"train": "lora"},
    # at first the policy is the reference, and their difference is rounding
    "full": {"train": "full", "kl_weight": 3.0, "tolerance": 2e-4},
    "reference": {"kl_weight": 3.0, "tolerance": 2e-4},
    "unguided": {"guidance_in_training": False, "old_log_probs": "training", "training_steps": 3},
    "asymmetric": {
        "clip_range": (5e-5, 5e-4), "clip_dimensions": 2 * 4 * 8 * 8,
        "step_weights": "equal", "timestep_window": (0, 3),
    },
    "window": {
        "timestep_window": (1, 3), "timestep_fraction": 1.0, "gradient_checkpointing": True,
        "trajectory": "host", "rollout_noise": "window",
    },
    "kl": {"trust_region": "kl", "max_kl": 1e-5, "old_log_probs": "training"},
}  # fmt: skip


@pytest.mark.parametrize("options", LOSSES.values(), ids=LOSSES)
def test_the_gradient_of_every_update_is_that_of_a_slow_loop(make, tmp_path, options):
    defaults = {"timestep_fraction": 0.5, "clip_range": 1e-4, "inner_epochs": 2}
    options = dict(options)
    tolerance = options.pop("tolerance", 2e-5)
    policy = make(
        micro_batch=3, max_grad_norm=1e9, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3),
        **(defaults | options),
    )  # fmt: skip
    trainer = fit(policy, tmp_path)
    rollout, (advantages, _) = policy.rollouts[0], policy.given[0]
    assert sorted(rollout.index.tolist()) == list(range(16))
    assert trainer.callback_metrics["policy/clip_fraction"] > 0
    assert len(policy.steps_taken) == 4
    window, kept = policy.window_of_steps, policy.trained_steps
    for number, (weights, gradients) in enumerate(policy.steps_taken):
        k, update = divmod(number, 2)
        rows = range(8 * update, 8 * update + 8)
        steps = chosen_steps(rollout.index[list(rows)], window, kept, (42, 0, k)).tolist()
        slow = slow_gradient(
            policy, rollout, rows, steps, advantages[list(rows)], weights, policy.steps_taken[0][0]
        )
        fast = flat(gradients)
        assert slow.norm() > 1e-5
        assert (fast - slow).norm() / slow.norm() < tolerance
        assert (fast - slow).abs().max() / slow.norm() < tolerance / 4


@pytest.mark.parametrize("micro_batch", [1, 5, 64])
def test_the_ratio_is_one_before_the_first_update(make, tmp_path, micro_batch):
    trainer = fit(make(micro_batch=micro_batch), tmp_path)
    assert trainer.callback_metrics["policy/ratio_deviation"] < 1e-5


def test_rounding_that_the_clip_range_would_eat_is_refused(make, tmp_path):
    class Rounded(RecordedDDPO):
        def make_sampler(self):
            sampler = super().make_sampler()
            collect = sampler.collect

            def rounded(*args):
                rollout = collect(*args)
                return replace(rollout, log_probs=rollout.log_probs.half().float())

            sampler.collect = rounded
            return sampler

    with pytest.raises(UserError, match=r"the ratio of unchanged weights .* 32-true is too low"):
        fit(make(kind=Rounded, clip_range=1e-4), tmp_path)


def test_the_micro_batch_does_not_change_the_weights(make, tmp_path):
    states = []
    for micro_batch in (1, 7, 64):
        policy = make(train="full", micro_batch=micro_batch, optimizer=sgd)
        start = tiny_weights(policy)
        fit(policy, tmp_path)
        states.append(state_of(policy))
    assert distance(states[0], start) > 1e-3
    assert distance(states[0], states[1]) < 1e-6
    assert distance(states[0], states[2]) < 1e-6


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=1.0)


def tiny_weights(policy):
    unet = load_pipeline(policy.hparams.pipeline).unet
    return {f"model.unet.{name}": tensor for name, tensor in unet.state_dict().items()}


def test_a_batch_of_any_size_samples_the_same_images(make, tmp_path):
    policies = [make(sample_batch=b) for b in (1, 6, 16)]
    for policy in policies:
        fit(policy, tmp_path)
    one, *others = (p.rollouts[0] for p in policies)
    for other in others:
        torch.testing.assert_close(one.latents, other.latents, rtol=0, atol=1e-4)
        torch.testing.assert_close(one.appearance, other.appearance, rtol=0, atol=1e-4)


def test_samples_without_advantage_are_skipped_and_weigh_zero(make, tmp_path):
    class Weighed(RecordedDDPO):
        """Trains every pair; an advantage of 1e-30 is a weight of zero that is not skipped."""

        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            advantages = self.advantages

            def weighed(*args):
                values, flat_groups = advantages(*args)
                return Advantages(torch.where(values == 0, 1e-30, values), flat_groups)

            self.advantages = weighed

    # Of four prompts one is tied: its reward does not depend on the image
    class Tied(Brightness):
        def forward(self, images, conditions):
            scored = super().forward(images, conditions)
            tied = conditions[:, :4].sum(dim=1) == 0
            return scored._replace(value=torch.where(tied, 0.5, scored.value))

    states, passes = [], []
    for kind in (RecordedDDPO, Weighed):
        policy = make(kind=kind, train="full", reward=Tied(), std_floor=1e-4, optimizer=sgd)
        seen = []

        def note(phase, done, total, seen=seen):
            if phase == "update":
                seen.append(total)

        progress.subscribe(note)
        trainer = fit(policy, tmp_path)
        progress.unsubscribe(note)
        states.append(state_of(policy))
        passes.append(len(seen))
        assert trainer.callback_metrics["reward/flat_groups"] == 0.25
    assert passes[0] < passes[1] == 16 * 4 / 8
    assert distance(*states) < 1e-6


def test_an_epoch_without_any_advantage_changes_nothing_but_goes_on(make, tmp_path):
    class Same(Brightness):
        def forward(self, images, conditions):
            return super().forward(torch.full_like(images, 2 / 3), conditions)

    policy = make(train="full", reward=Same(), optimizer=sgd)
    trainer = fit(policy, tmp_path, epochs=2)
    assert distance(state_of(policy), tiny_weights(policy)) == 0
    assert trainer.callback_metrics["reward/flat_groups"] == 1
    assert trainer.callback_metrics["policy/grad_norm"] == 0


@pytest.mark.parametrize("train", ["lora", "full"])
def test_a_checkpoint_holds_only_what_is_trained(make, tmp_path, train):
    saver = ModelCheckpoint(tmp_path, filename="x")
    policy = make(train=train, baseline="window")
    fit(policy, tmp_path, enable_checkpointing=True, callbacks=[saver])
    checkpoint = torch.load(tmp_path / "x.ckpt", weights_only=True)
    names = set(checkpoint["state_dict"])
    assert names
    if train == "lora":
        assert all(name.startswith("model.unet.") and "lora_" in name for name in names)
    else:
        assert names == set(tiny_weights(policy))
    assert sum(len(rewards) for rewards in checkpoint["reward_window"].values()) == 16
    again = DDPO.load_from_checkpoint(tmp_path / "x.ckpt", reward=policy.reward)
    assert distance(state_of(policy), state_of(again)) == 0
    assert again.window.history == policy.window.history


def test_a_checkpoint_from_before_updates_were_skipped_resumes(make, tmp_path):
    saver = ModelCheckpoint(tmp_path, filename="x")
    fit(make(), tmp_path, enable_checkpointing=True, callbacks=[saver])
    checkpoint = torch.load(tmp_path / "x.ckpt", weights_only=True)
    del checkpoint["ddpo"]
    torch.save(checkpoint, tmp_path / "old.ckpt")
    resumed, whole = make(), make()
    trainer = quiet_trainer(tmp_path, max_epochs=2)
    trainer.fit(resumed, datamodule=prompts(), ckpt_path=tmp_path / "old.ckpt")
    fit(whole, tmp_path, epochs=2)
    assert distance(state_of(resumed), state_of(whole)) == 0
    assert resumed.skipped.total == 0


def test_the_norm_of_the_gradient_is_bounded(make, tmp_path):
    policy = make(train="full", max_grad_norm=1e-3, optimizer=sgd, updates=1)
    trainer = fit(policy, tmp_path)
    assert trainer.callback_metrics["policy/grad_norm"] > 1e-3
    ((weights, gradients),) = policy.steps_taken
    assert flat(gradients).norm() == pytest.approx(1e-3, rel=1e-3)
    moved = flat(policy.trained_parameters()) - flat(weights)
    assert moved.norm().item() == pytest.approx(1e-3, rel=1e-2)


def test_advantages_go_to_the_samples_that_earned_them(make, tmp_path):
    policy = make(baseline="none")
    fit(policy, tmp_path)
    (rollout,), ((advantages, _),) = policy.rollouts, policy.given
    images = policy.model.decode(rollout.latents[:, -1])
    assert torch.equal(advantages, policy.reward(images, rollout.conditions).value)
    for row, text in enumerate(rollout.prompts):
        assert torch.equal(rollout.conditions[row], CONDITIONS[prompt_id(text)])
        key = keys(42, "rollout", 0, rollout.index[row : row + 1])
        # the image of a rollout can be drawn again, alone, by its key; LoRA has moved since
        assert torch.equal(
            next(policy.model.trajectory([text], key)).latents[0], rollout.latents[row, 0]
        )


def test_every_epoch_draws_new_noise(make, tmp_path):
    policy = make()
    fit(policy, tmp_path, epochs=2)
    first, second = policy.rollouts
    starts = torch.cat([first.latents[:, 0], second.latents[:, 0]]).flatten(1)
    assert len(starts.unique(dim=0)) == 32


@pytest.mark.parametrize("baseline", ["group", "window", "none"])
def test_curves(make, tmp_path, baseline):
    metrics = fit(make(baseline=baseline, inner_epochs=2), tmp_path, epochs=2).callback_metrics
    assert all(math.isfinite(value) for value in metrics.values())
    assert metrics["trainer/optimizer_steps"] == 8
    assert {"reward/mean", "reward/std", "reward/hair", "reward_of_prompt/MEL"} <= metrics.keys()
    assert sum(name.startswith("reward_of_prompt/") for name in metrics) == 4
    assert 0 < metrics["time/rollout_share"] < 1


@pytest.mark.parametrize("sign", [1, -1])
def test_the_reward_rises(make, tmp_path, sign):
    """The same noise gives brighter images after brightness was rewarded, and darker after dark."""

    class Clear(RecordedDDPO):
        """Its latents are seen as they are, for an untrained decoder's brightness hardly moves."""

        def configure_model(self):
            super().configure_model()
            self.model.decode = lambda latents: latents[:, :3].sigmoid()

    class Signed(Brightness):
        def forward(self, images, conditions):
            scored = super().forward(images, conditions)
            return scored._replace(value=sign * scored.value)

    policy = make(
        kind=Clear, train="full", reward=Signed(), std_floor=1e-3, clip_range=0.1, guidance=1.0,
        optimizer=lambda p: torch.optim.AdamW(p, lr=3e-3),
    )  # fmt: skip
    fit(policy, tmp_path, epochs=8)
    texts, key = list(PROMPTS), torch.arange(32)
    after = policy.generate(texts, key).mean(dim=(1, 2, 3))
    load = {name.removeprefix("model.unet."): w for name, w in tiny_weights(policy).items()}
    policy.model.unet.load_state_dict(load)
    change = sign * (after - policy.generate(texts, key).mean(dim=(1, 2, 3)))
    assert change.mean() > 0.01
    assert (change > 0).sum() >= 24


def test_the_exported_policy_draws_what_the_trained_one_drew(make, tmp_path):
    for train in ("lora", "full"):
        folder = tmp_path / train
        lr = torch.optim.AdamW
        policy = make(train=train, optimizer=lambda p, lr=lr: lr(p, lr=1e-2))
        trainer = fit(policy, tmp_path)
        policy.export(folder)
        few, key = list(PROMPTS[:3]), torch.tensor([1, 2, 3])
        drawn = policy.generate(few, key)
        again = make(policy=str(folder), train=train)
        trainer = quiet_trainer(tmp_path)
        trainer.test(again, prompts(), verbose=False)
        assert torch.equal(again.generate(few, key), drawn)
        plain = make(policy=None)
        quiet_trainer(tmp_path).test(plain, prompts(), verbose=False)
        assert (plain.generate(few, key) - drawn).abs().max() > 1e-3


def test_generated_images_depend_on_prompt_and_key_alone(make, tmp_path):
    policy = make(sample_batch=2, policy=None)
    quiet_trainer(tmp_path).test(policy, prompts(), verbose=False)
    texts, key = list(PROMPTS[:5]), torch.tensor([5, 6, 7, 8, 9])
    images = policy.generate(texts, key)
    assert images.shape == (5, 3, 16, 16)
    assert 0 <= images.min() < images.max() <= 1
    torch.testing.assert_close(policy.generate(texts[3:4], key[3:4])[0], images[3])
    assert (policy.generate([texts[0]], key[1:2])[0] - images[0]).abs().max() > 1e-3
    assert (policy.generate([texts[1]], key[0:1])[0] - images[0]).abs().max() > 1e-6


def test_validation_repeats_its_noise_and_leaves_training_alone(make, tmp_path):
    with_validation, without = make(), make()
    data = prompts(validation_samples_per_prompt=2, eval_batch_size=3)
    trainer = fit(with_validation, tmp_path, data=data, epochs=2)
    fit(without, tmp_path, epochs=2)
    assert distance(state_of(with_validation), state_of(without)) == 0
    assert with_validation.training
    assert with_validation.model.unet.training
    first = trainer.validate(with_validation, data, verbose=False)
    assert first == trainer.validate(with_validation, data, verbose=False)
    assert 0 <= first[0]["val/apr"] <= 1


def test_apr_is_the_share_of_images_whose_artifacts_are_as_asked(make, tmp_path):
    policy = make(policy=None)
    data = prompts(test_samples_per_prompt=3, predict_batch_size=5)
    (scores,) = quiet_trainer(tmp_path).test(policy, data, verbose=False)
    hits, rewards = [], []
    for batch in data.test_dataloader():
        images = policy.generate(batch["prompt"], keys(42, "test", 0, batch["index"]))
        read = policy.scorer.judge(images).sigmoid() > 0.5
        asked = batch["condition"][:, : len(ARTIFACTS)].bool()
        hits += [r.tolist() == a.tolist() for r, a in zip(read, asked, strict=True)]
        rewards += policy.reward_of(images, batch["condition"]).tolist()
    assert len(hits) == 12
    assert scores["test/apr"] == pytest.approx(sum(hits) / 12)
    assert scores["test/reward"] == pytest.approx(sum(rewards) / 12)


def test_what_cannot_work_is_refused_before_anything_is_loaded(make, tmp_path, tiny_classifiers):
    cases = [
        (make(updates=3), "multiple of 3; the nearest are 15 and 18"),
        (make(judge="nowhere.ckpt"), "the judge, made by: rl4med-ddpo fit --config judge"),
        (
            tiny_ddpo("no/where/at/all", tiny_classifiers),
            "the fine-tuned pipeline, made by: rl4med-ddpo",
        ),
    ]
    for policy, says in cases:
        with pytest.raises(UserError, match=says):
            fit(policy, tmp_path)
        assert not hasattr(policy, "model")
    missing = make(policy=str(tmp_path / "no_policy"))
    with pytest.raises(UserError, match=r"the trained policy, made by: .* ddpo\.yaml"):
        quiet_trainer(tmp_path).test(missing, prompts(), verbose=False)


def test_gradients_that_are_scaled_before_clipping_are_refused(make, tmp_path):
    policy = make()
    policy.trainer = quiet_trainer(tmp_path)
    # a trainer on the CPU turns 16-mixed into bf16-mixed
    policy.trainer.strategy.precision_plugin.precision = "16-mixed"
    with pytest.raises(UserError, match="bf16-mixed or 32-true"):
        policy.setup("fit")
    policy.setup("test")


def test_the_reference_is_the_policy_before_training_without_a_copy(make, tmp_path):
    policy = make(kl_weight=1.0, optimizer=sgd)
    trainer = fit(policy, tmp_path)
    base = load_pipeline(policy.hparams.pipeline).unet
    x, step = policy.rollouts[0].latents[:2, 1], torch.tensor([1, 1])
    text = policy.model.embed([""] * 2)
    trainable = [p for p in policy.model.unet.parameters() if p.requires_grad]
    found = policy.objective.noise_before_training(x, step, text)
    # an empty prompt has nothing to be guided to
    timestep = policy.model.schedule.timesteps[step]
    expected = base(x, timestep, text).sample
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (policy.model.predict_noise(x, timestep, text) - expected).abs().max() > 1e-4
    assert [p for p in policy.model.unet.parameters() if p.requires_grad] == trainable
    assert trainer.callback_metrics["policy/reference_kl"] > 0


@pytest.mark.parametrize("train", ["lora", "full"])
def test_validation_says_how_far_the_policy_has_come(train, make, tmp_path):
    policy = make(optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2), sample_batch=3, train=train)
    trainer = fit(policy, tmp_path, prompts(validation_samples_per_prompt=1))
    base = load_pipeline(policy.hparams.pipeline).unet
    batch = next(iter(trainer.datamodule.val_dataloader()))
    slow = []
    with torch.no_grad():
        for row in range(3):
            prompt, total = batch["prompt"][row], 0.0
            noise_key = keys(policy.hparams.seed, "validation", 0, batch["index"][row : row + 1])
            for transition in policy.model.trajectory([prompt], noise_key):
                (mean, s), (start, _) = (
                    slow_transition(policy, unet, prompt, transition.latents, transition.step)
                    for unet in (policy.model.unet, base)
                )
                total += kl_divergence(Normal(mean, s), Normal(start, s)).mean()
            slow.append(total)
    found = policy.divergence_of(batch)
    torch.testing.assert_close(found, torch.stack(slow), rtol=1e-3, atol=1e-7)
    assert found.min() > 1e-5
    logged = trainer.callback_metrics["val/sqrt_kl"]
    torch.testing.assert_close(logged, found.mean().sqrt(), rtol=1e-3, atol=1e-6)


def test_a_heavy_penalty_keeps_the_policy_near_the_reference(make, tmp_path):
    apart = []
    for weight in (1e-9, 1e3):
        policy = make(
            kl_weight=weight, clip_range=0.5, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2)
        )
        metrics = fit(policy, tmp_path, epochs=3).callback_metrics
        apart.append(metrics["policy/reference_kl"].item())
    assert apart[1] < apart[0] / 4


def test_a_compiled_unet_trains_the_same_weights_under_the_same_names(make, tmp_path):
    plain, compiled = (
        make(train="full", compile=backend, optimizer=sgd, updates=1, micro_batch=8, steps=2)
        for backend in (None, "eager")
    )
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for policy in (plain, compiled):
        fit(policy, tmp_path)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > graphs
    assert distance(state_of(plain), state_of(compiled)) < 1e-6


def test_diversity_is_paid_and_logged_with_its_share(make, tmp_path):
    policy, plain = make(diversity_weight=0.5, baseline="none"), make(baseline="none")
    metrics = fit(policy, tmp_path).callback_metrics
    fit(plain, tmp_path)
    (rollout,), ((paid, _),), ((unpaid, _),) = policy.rollouts, policy.given, plain.given
    groups = torch.tensor([prompt_id(prompt) for prompt in rollout.prompts])
    expected = 0.5 * group_diversity(rollout.appearance, groups)
    assert expected.min() > 0
    torch.testing.assert_close(paid - unpaid, expected)
    share = expected.sum() / paid.sum()
    assert metrics["reward_share/diversity"].item() == pytest.approx(share.item(), rel=1e-4)
    shared = [v.item() for name, v in metrics.items() if name.startswith("reward_share/")]
    assert len(shared) == 7
    assert sum(shared) == pytest.approx(1, abs=1e-5)


def test_a_clip_range_is_scaled_to_the_latents(make):
    policy = make(clip_range=(1e-4, 2e-4), clip_dimensions=4 * 64 * 64)
    policy.configure_model()
    # 4 x 8 x 8 latents are 64 times smaller
    assert policy.clip_range == pytest.approx((64e-4, 128e-4))
    unscaled = make(clip_range=1e-4)
    unscaled.configure_model()
    assert unscaled.clip_range == (1e-4, 1e-4)


def test_batches_are_scored_by_themselves_and_joined_in_their_order(make, tmp_path):
    policy = make(sample_batch=6)
    fit(policy, tmp_path)
    (rollout,) = policy.rollouts
    images = policy.model.decode(rollout.latents[:, -1])
    expected = policy.reward(images, rollout.conditions)
    torch.testing.assert_close(rollout.scored, expected)
    cells = rollout.appearance.view(16, 3, 8, 8)
    torch.testing.assert_close(cells[13, 2, 3, 5], images[13, 2, 6:8, 10:12].mean())
