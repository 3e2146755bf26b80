import pytest

from rl4med_ddpo.foundation.errors import UserError
from rl4med_ddpo.lightning_modules.prerequisites import Prerequisite, require


def test_all_that_is_missing_is_named_at_once_with_its_command(tmp_path):
    there = tmp_path / "there.ckpt"
    there.touch()
    needs = [
        Prerequisite(str(there), "the judge", "make judge"),
        Prerequisite(str(tmp_path / "reward.ckpt"), "the reward network", "make reward"),
        Prerequisite(str(tmp_path / "pipeline"), "the pipeline", "make pipeline"),
    ]
    with pytest.raises(UserError) as error:
        require(needs)
    said = str(error.value)
    assert said.startswith("2 of the 3 things this stage starts from are missing")
    for part in (str(tmp_path / "reward.ckpt"), "the reward network", "make reward"):
        assert part in said
    assert "make pipeline" in said
    assert "make judge" not in said
    assert said.endswith("make demo")


def test_nothing_is_said_when_all_is_there(tmp_path):
    require([Prerequisite(str(tmp_path), "a folder", "mkdir")])
    require([])
