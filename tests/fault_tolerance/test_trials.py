"""A trial leaves a finished run alone, and only trained weights are scored."""

import shutil

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rl4med_ddpo.datamodules.dermoscopy import DermoscopyFolder
from rl4med_ddpo.foundation.errors import UserError
from support.command_line import classifier, ddpo, fine_tuning, in_process
from support.tiny import tiny_ddpo

FEW = (
    "--data.root=null",
    "--data.samples_per_epoch=8",
    "--data.test_samples_per_prompt=2",
    "--model.steps=2",
    "--model.sample_batch=4",
    "--data.predict_batch_size=4",
)


@pytest.fixture(scope="module")
def commands(tiny_pipeline, tiny_classifiers, tmp_path_factory):
    """The options of each stage, as a function of the run folder."""
    isic = tmp_path_factory.mktemp("isic") / "data"
    DermoscopyFolder(isic, images=64, size=16, combinations="balanced").write()
    return {
        "classifier": lambda folder: classifier(folder, isic),
        "sd": lambda folder: fine_tuning(folder, tiny_pipeline, isic),
        "ddpo": lambda folder: ddpo(folder, tiny_pipeline, tiny_classifiers, *FEW),
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


@pytest.mark.parametrize(
    ("stage", "subcommand"),
    [("classifier", "test"), ("classifier", "validate"), ("sd", "validate")],
)
def test_untrained_weights_are_not_scored(commands, tmp_path, monkeypatch, stage, subcommand):
    monkeypatch.chdir(tmp_path)
    _, *options = commands[stage](tmp_path / "new")
    with pytest.raises(UserError, match=r"no trained weights in .*new/checkpoints"):
        in_process(subcommand, *options)
    assert not (tmp_path / "new" / "results").exists()


def test_the_best_weights_of_a_run_are_scored_and_named(run, tmp_path, caplog):
    caplog.set_level("INFO", "lightning.pytorch")
    for stage, named in (
        ("classifier", "best.ckpt"), ("sd", "newest.ckpt"), ("ddpo", "policy"),
    ):  # fmt: skip
        run(stage, "validate")
        said = [r.message for r in caplog.records if r.message.startswith("weights: ")][-1]
        assert f"{tmp_path / stage}" in said
        assert named in said
        assert ", sha256 " in said


@pytest.mark.parametrize("which", ["best", "last"])
def test_a_checkpoint_of_the_run_is_named_by_best_or_last(run, which):
    for stage in ("classifier", "ddpo"):
        run(stage, "validate", f"--ckpt_path={which}")


def test_a_policy_is_validated_and_not_the_pipeline(run, tmp_path):
    with_policy = run("ddpo", "validate").model.model.unet
    assert any("lora" in name for name, _ in with_policy.named_parameters())
    without = run("ddpo", "validate", "--model.policy=null").model.model.unet
    assert not any("lora" in name for name, _ in without.named_parameters())


def test_adapters_are_not_loaded_into_a_model_without(run):
    with pytest.raises(UserError, match="does not fit this model") as error:
        run("ddpo", "test", "--model.policy=null", "--ckpt_path=last")
    assert "--model.policy FOLDER" in str(error.value)


def test_a_policy_with_missing_adapters_is_refused(run, finished, tmp_path):
    shutil.copytree(finished / "ddpo" / "policy", tmp_path / "part")
    (file,) = (tmp_path / "part").glob("*.safetensors")
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    kept = dict(sorted(load_file(file).items())[:4])
    save_file(kept, file, metadata)
    for subcommand in ("test", "validate"):
        with pytest.raises(UserError, match=r"is not whole: \d+ of its \d+ adapters are missing"):
            run("ddpo", subcommand, f"--model.policy={tmp_path / 'part'}")


def test_in_python_a_policy_is_loaded_without_a_trainer(finished, tiny_pipeline, tiny_classifiers):
    module = tiny_ddpo(
        tiny_pipeline, tiny_classifiers, policy=str(finished / "ddpo" / "policy"), train="lora"
    )
    module.configure_model()
    assert any("lora" in name for name, _ in module.model.unet.named_parameters())
    with pytest.raises(UserError, match="to be sampled from"):
        module.configure_optimizers()
