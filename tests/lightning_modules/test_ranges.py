import pytest

from rl4med_ddpo.foundation.errors import UserError
from rl4med_ddpo.lightning_modules import DDPO
from rl4med_ddpo.lightning_modules.policy_gradient.ranges import RANGES, require_in_range


def test_the_defaults_are_in_range():
    require_in_range(DDPO().hparams)
    assert RANGES.keys() <= DDPO().hparams.keys()


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
        ({"updates": 0}, "updates=0: allowed is at least 1; try --model.updates 2"),
        ({"guidance": -1}, "guidance=-1: allowed is at least 0"),
    ],
)
def test_what_is_out_of_range_is_named_with_the_range_and_a_fix(given, says):
    with pytest.raises(UserError, match="out of range") as error:
        require_in_range({**DDPO().hparams, **given})
    assert says in str(error.value)


def test_all_that_is_wrong_is_named_at_once():
    with pytest.raises(UserError) as error:
        require_in_range({**DDPO().hparams, "eta": 2, "steps": 0})
    for part in ("eta=2", "steps=0"):
        assert part in str(error.value)
