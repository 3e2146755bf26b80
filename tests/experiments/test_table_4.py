"""Table 4's driver: each arm is a command of its own, and a finished one is not run again."""

import json

import pytest

from rl4med_ddpo.experiments import table_4
from rl4med_ddpo.foundation.errors import UserError


def test_each_arm_trains_and_tests_with_equal_counts(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(table_4, "train_and_test", ran.append)
    done = tmp_path / "table4" / "real" / "seed_1" / "results"
    done.mkdir(parents=True)
    (done / "metrics.json").write_text("{}")
    table_4.table_4("demo/classifier.yaml", tmp_path, per_subgroup=7, options=["--data.size=16"])
    assert len(ran) == 14
    fits = [fit for fit, _ in ran]
    sources = []
    for fit, test in ran:
        assert (fit[0], test[0]) == ("fit", "test")
        assert "--data.size=16" in fit
        folder = fit[fit.index("--trainer.default_root_dir") + 1]
        assert test[test.index("--ckpt_path") + 1] == f"{folder}/checkpoints/best.ckpt"
        arm = fit[fit.index("--trainer.callbacks.arm") + 1]
        assert f"table4/{arm}/seed_" in folder
        assert fit[fit.index("--data.distort") + 1] == ("true" if arm == "classical" else "false")
        if "--data.extra" in fit:
            extra = json.loads(fit[fit.index("--data.extra") + 1])
            assert extra["per_subgroup"] == 7
            sources.append(extra["source"])
        else:
            assert arm == "real"
    assert sorted(set(sources)) == sorted(
        ["train", f"{tmp_path}/sd/samples", f"{tmp_path}/ddpo/samples"]
    )
    assert len({(fit[fit.index("--seed_everything") + 1]) for fit in fits}) == 3


@pytest.mark.parametrize("seeds", [[0], [0, 1], [3, 3, 3]])
def test_fewer_than_three_seeds_are_refused(tmp_path, seeds):
    with pytest.raises(UserError, match="at least three different seeds"):
        table_4.table_4(run=tmp_path, seeds=seeds)
