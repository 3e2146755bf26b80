"""The benchmark of ways of learning, on tiny stages in the place of the demo's."""

import json
import shutil
import sys

import pytest

from benchmarks import learning
from benchmarks.learning_curve import COLUMNS
from support.command_line import in_process
from support.dermoscopy import PROMPTS

FEW_PROMPTS = f"data.prompts={json.dumps(list(PROMPTS[::16]))}"
TINY = (
    FEW_PROMPTS, "data.samples_per_epoch=16", "data.validation_samples_per_prompt=1",
    "model.steps=4", "data.predict_batch_size=8", "model.sample_batch=8",
    "frontier.guidances=[1, 3]",
)  # fmt: skip


@pytest.fixture
def demo(tiny_pipeline, tiny_classifiers, isic, tmp_path):
    root = tmp_path / "demo"
    for stage, name in (("classifier", "reward"), ("judge", "judge")):
        (root / stage / "checkpoints").mkdir(parents=True)
        shutil.copy(tiny_classifiers[name], root / stage / "checkpoints" / "best.ckpt")
    (root / "sd").mkdir()
    (root / "sd" / "pipeline").symlink_to(tiny_pipeline)
    (root / "balanced").symlink_to(isic)
    return root


@pytest.mark.parametrize("method", learning.METHODS)
def test_every_method_is_understood_by_the_command_line(method, tmp_path, capsys):
    run = tmp_path / "run"
    args = learning.command(learning.METHODS[method], "fit", run, tmp_path, seed=1)
    with pytest.raises(SystemExit) as end:
        in_process(*args[3:], "--print_config")
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert "benchmarks.learning_curve.LearningCurve" in said
    assert f"default_root_dir: {run}" in said


def test_it_measures_what_a_real_training_learns(demo, tmp_path, monkeypatch, capsys):
    options = [word for option in TINY for word in ("--option", option)]
    monkeypatch.setattr(
        sys, "argv",
        ["learning", "--method", "kl4", "--images", "1024", "--demo", str(demo),
         "--per-prompt", "1", *options],
    )  # fmt: skip

    def here(command, run, demo):
        monkeypatch.setenv("DEMO", str(demo))
        in_process(*command[3:])

    monkeypatch.setattr(learning, "execute", here)
    learning.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["seed"], found["guidance"]) == (0, 3.0)
    # what differs from the method is part of its name
    assert found["method"].startswith("kl4 ")
    assert " steps=4" in found["method"]
    assert found["label"] == "other policy in training"
    assert {len(found[name]) for name in COLUMNS} == {2}
    assert found["images"] == [16, 32]
    assert 0 < found["cpu_s"][0] < found["cpu_s"][1]
    assert found["sqrt_kl"][1] > 0
    assert [point["guidance"] for point in found["frontier"]] == [1.0, 3.0]
    assert all(0 <= point["apr"] <= 1 for point in found["frontier"])
