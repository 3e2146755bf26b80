import pytest

from rl4med_ddpo.foundation.errors import UserError
from rl4med_ddpo.lightning_modules import DDPO, DRaFT
from rl4med_ddpo.lightning_modules.policy_gradient.options import (
    RANGES,
    clip_pair,
    require_options,
)


def test_the_defaults_are_in_range():
    require_options(DDPO().hparams)
    assert RANGES.keys() <= DDPO().hparams.keys() | DRaFT().hparams.keys()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"eta": -0.5}, "eta=-0.5: allowed is (0, 1]; try --model.eta 1"),
        ({"eta": 0}, "eta=0: allowed is (0, 1]"),
        ({"eta": 1.5}, "eta=1.5"),
        ({"eta": float("nan")}, "eta=nan"),
        ({"kl_weight": -1}, "kl_weight=-1: allowed is at least 0"),
        ({"max_skipped": -1}, "max_skipped=-1: allowed is at least 0; try --model.max_skipped 3"),
        ({"micro_batch": 0}, "micro_batch=0: allowed is at least 1"),
        ({"sample_batch": -1}, "sample_batch=-1: allowed is at least 1"),
        ({"max_kl": 0}, "max_kl=0: allowed is above 0; try --model.max_kl 1e-05"),
        ({"training_steps": 0}, "training_steps=0: allowed is at least 1"),
        ({"updates": 0}, "updates=0: allowed is at least 1; try --model.updates 2"),
        ({"guidance": -1}, "guidance=-1: allowed is at least 0"),
    ],
)
def test_what_is_out_of_range_is_named_with_the_range_and_a_fix(given, says):
    with pytest.raises(UserError, match="out of range") as error:
        require_options({**DDPO().hparams, **given})
    assert says in str(error.value)


def test_all_that_is_wrong_is_named_at_once():
    with pytest.raises(UserError) as error:
        require_options({**DDPO().hparams, "eta": 2, "steps": 0})
    for part in ("eta=2", "steps=0"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"timestep_fraction": 0.0}, ["timestep_fraction=0.0", "(0, 1]"]),
        ({"timestep_fraction": 1.5}, ["timestep_fraction=1.5", "(0, 1]"]),
        ({"timestep_window": (3, 3)}, ["timestep_window=[3, 3]", "[0, 50]", "[25, 50]"]),
        ({"timestep_window": (-1, 3)}, ["timestep_window=[-1, 3]", "[0, 50]"]),
        ({"timestep_window": (10, 51)}, ["timestep_window=[10, 51]", "[0, 50]"]),
        ({"clip_range": 0.0}, ["clip_range=0.0", "try --model.clip_range 0.0001"]),
        ({"clip_range": (1.0, 0.1)}, ["clip_range=(1.0, 0.1)", "(0, 1) below"]),
        ({"rollout_noise": "window"}, ["timestep_window [0, 25]", "rollout_noise: all"]),
        ({"training_steps": 8, "timestep_window": (0, 9)}, ["of 8 steps", "[4, 8]"]),
        ({"guidance_in_training": False}, ["guidance_in_training", "old_log_probs: training"]),
    ],
)
def test_what_does_not_go_together_is_refused_at_construction(options, says):
    with pytest.raises(UserError) as error:
        DDPO(**options)
    for part in says:
        assert part in str(error.value)


def test_what_goes_together():
    DDPO(
        timestep_window=(0, 50), clip_range=(0.5, 3.0), kl_weight=0.1, micro_batch="auto",
        guidance_in_training=False, old_log_probs="training",
    )  # fmt: skip
    DDPO(guidance_in_training=False, guidance=1.0)


def test_one_clip_range_holds_on_both_sides():
    assert clip_pair(0.1) == (0.1, 0.1)
    assert clip_pair((0.1, 0.3)) == clip_pair([0.1, 0.3]) == (0.1, 0.3)
