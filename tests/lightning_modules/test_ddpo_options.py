import pytest

from rl4med_ddpo.foundation.errors import UserError
from rl4med_ddpo.lightning_modules import DDPO
from rl4med_ddpo.lightning_modules.policy_gradient.ddpo_options import clip_pair


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
        ({"kl_weight": 0.1, "train": "full"}, ["second copy", "train: lora"]),
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
