"""A trial leaves a finished run alone."""

import shutil

import pytest

from rl4med_ddpo.foundation.errors import UserError
from support.command_line import classifier, ddpo, fine_tuning, in_process

FEW = (
    "--data.root=null",
    "--data.samples_per_epoch=8",
    "--data.test_samples_per_prompt=2",
    "--model.steps=2",
    "--model.sample_batch=4",
    "--data.predict_batch_size=4",
)


@pytest.fixture(scope="module")
def commands(tiny_pipeline, tiny_classifiers, isic):
    """The options of each stage, as a function of the run folder."""
    return {
        "classifier": lambda folder: classifier(folder, isic),
        "sd": lambda folder: fine_tuning(folder, tiny_pipeline, isic),
        "ddpo": lambda folder: ddpo(folder, tiny_pipeline, tiny_classifiers, *FEW, grids=True),
    }


@pytest.fixture(scope="module")
def finished(commands, tmp_path_factory):
    """A run of one epoch of each stage, scored; in each test a copy."""
    made = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)
        for stage, command in commands.items():
            in_process(*command(made / stage), "--trainer.max_epochs=1")
        for stage in ("classifier", "ddpo"):
            _, *options = commands[stage](made / stage)
            in_process("test", *options)
    return made


@pytest.fixture
def run(commands, finished, tmp_path, monkeypatch):
    """Gives a command to a stage, in a copy of its finished run."""
    monkeypatch.chdir(tmp_path)

    def give(stage, subcommand, *options):
        folder = tmp_path / stage
        if not folder.exists():
            shutil.copytree(finished / stage, folder, symlinks=True)
        _, *own = commands[stage](folder)
        return in_process(subcommand, *own, *options)

    return give


def products(folder):
    """Every file of a run and its content, without those of a trial."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith(".lock") and "trial" not in path.parts
    }


@pytest.mark.parametrize(
    ("stage", "subcommand", "trial"),
    [
        ("classifier", "fit", "fast_dev_run=true"),
        ("sd", "fit", "fast_dev_run=true"),
        ("ddpo", "fit", "fast_dev_run=true"),
        ("classifier", "test", "limit_test_batches=1"),
        ("ddpo", "test", "limit_test_batches=2"),
        ("ddpo", "test", "fast_dev_run=true"),
        ("ddpo", "predict", "limit_predict_batches=1"),
    ],
)
def test_a_trial_leaves_a_finished_run_as_it_is(run, tmp_path, finished, stage, subcommand, trial):
    run(stage, subcommand, f"--trainer.{trial}", "--trainer.logger=false")
    assert products(tmp_path / stage) == products(finished / stage)


@pytest.mark.parametrize(
    ("stage", "limit"),
    [("sd", "limit_train_batches=1"), ("ddpo", "limit_val_batches=1"),
     ("classifier", "overfit_batches=1")],
)  # fmt: skip
def test_a_limited_fit_is_another_run(run, tmp_path, finished, stage, limit):
    with pytest.raises(UserError, match=f"trainer.{limit.partition('=')[0]}"):
        run(stage, "fit", f"--trainer.{limit}", "--trainer.max_epochs=2")
    before, after = products(finished / stage), products(tmp_path / stage)
    assert after == before
