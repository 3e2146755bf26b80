from functools import partial

import pytest
import torch

from rl4med_ddpo.foundation.errors import UserError
from rl4med_ddpo.lightning_modules import Brightness, OnePassDDPO
from support.tiny import RecordedDDPO, flat, prompts, tiny_ddpo
from support.trainers import quiet_trainer


class RecordedOnePass(RecordedDDPO, OnePassDDPO):
    """Keeps what it did, and how often the U-Net ran and for how many images."""

    def configure_model(self):
        super().configure_model()
        self.runs = []
        self.model.unet.register_forward_pre_hook(lambda unet, args: self.runs.append(len(args[0])))


class Graded(Brightness):
    """In steps that rounding does not cross, so that equal images have equal advantages."""

    def forward(self, images, conditions):
        scored = super().forward(images, conditions)
        return scored._replace(value=(scored.value * 2000).round() / 2000)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=10.0)


@pytest.fixture
def make(tiny_pipeline, tiny_classifiers):
    return partial(
        tiny_ddpo, tiny_pipeline, tiny_classifiers, updates=1, reward=Graded(),
        std_floor=1e-4, optimizer=sgd, max_grad_norm=1e9,
    )  # fmt: skip


def fit(module, folder, epochs=2, **options):
    trainer = quiet_trainer(folder, max_epochs=epochs, **options)
    trainer.fit(module, datamodule=prompts())
    return trainer


@pytest.mark.parametrize(
    "options",
    [
        {},
        {
            "guidance": 1.0, "timestep_fraction": 0.5, "micro_batch": 3, "sample_batch": 3,
            "training_steps": 3,
        },
        {
            "timestep_window": (1, 3), "baseline": "none", "gradient_checkpointing": True,
            "rollout_noise": "window", "step_weights": "equal",
        },
    ],
    ids=["plain", "fraction", "window"],
)  # fmt: skip
def test_one_pass_takes_the_gradients_of_two(make, tmp_path, options):
    two, one = make(**options), make(kind=RecordedOnePass, **options)
    fit(two, tmp_path)
    trainer = fit(one, tmp_path)
    assert trainer.callback_metrics["policy/ratio_deviation"] == 0
    # in the second epoch both kinds of adapter weights have a gradient
    for epoch in range(2):
        expected = two.rollouts[epoch].appearance
        torch.testing.assert_close(one.rollouts[epoch].appearance, expected, rtol=0, atol=1e-5)
        assert torch.equal(one.given[epoch].values, two.given[epoch].values)
        expected, found = (flat(p.steps_taken[epoch][1]) for p in (two, one))
        assert expected.norm() > 1e-4
        assert (found - expected).norm() / expected.norm() < 1e-5


def test_what_is_sampled_is_the_same_to_the_last_bit(make, tmp_path):
    two, one = make(), make(kind=RecordedOnePass)
    fit(two, tmp_path, epochs=1)
    fit(one, tmp_path, epochs=1)
    assert torch.equal(one.rollouts[0].latents, two.rollouts[0].latents)
    assert torch.equal(one.rollouts[0].log_probs, two.rollouts[0].log_probs)
    assert not one.rollouts[0].log_probs.requires_grad


def test_the_unet_runs_once_for_each_action(make, tmp_path):
    policy = make(kind=RecordedOnePass, micro_batch=4)
    fit(policy, tmp_path, epochs=1)
    # 16 samples in batches of at most micro_batch, 4 steps, doubled by guidance
    assert policy.runs == [8] * 16


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"train": "full"}, "train='full'"),
        ({"updates": 2}, "updates=2"),
        ({"inner_epochs": 2}, "inner_epochs=2"),
        ({"kl_weight": 0.1}, r"kl_weight=0\.1"),
        ({"trust_region": "kl"}, "trust_region='kl'"),
        ({"compile": "inductor"}, "compile='inductor'"),
        ({"guidance_in_training": False, "old_log_probs": "training"}, "guidance_in_training"),
    ],
)
def test_what_needs_two_passes_is_refused(make, options, says):
    with pytest.raises(UserError, match=says + r".*class_path: DDPO"):
        make(kind=OnePassDDPO, **options)
