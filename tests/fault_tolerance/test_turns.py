"""A run in two turns: what may differ in the second, and what the first has left."""

import csv
import math
import shutil
from dataclasses import asdict

import pandas as pd
import pytest
import yaml
from safetensors.torch import load_file

from rl4med_ddpo.datamodules.prompts import ISICPromptDataModule
from rl4med_ddpo.datamodules.vocabulary import DERMOSCOPY
from rl4med_ddpo.foundation.errors import UserError
from support.command_line import classifier, ddpo, fine_tuning, in_process
from support.tiny_runs import differing, everything, last

WITH_COSINE = (
    "--model.lr_scheduler=torch.optim.lr_scheduler.CosineAnnealingLR",
    "--model.lr_scheduler.T_max=6",
    "--trainer.callbacks=null",
)
TRUTH = "ISIC_2019_Training_GroundTruth.csv"


@pytest.fixture(scope="module")
def commands(tiny_pipeline, tiny_classifiers, isic):
    """The command of each stage, as a function of the run folder."""
    few = ("--data.samples_per_epoch=8", "--model.steps=2", "--trainer.check_val_every_n_epoch=1")
    return {
        "classifier": lambda folder: classifier(folder, isic),
        "sd": lambda folder: fine_tuning(
            folder, tiny_pipeline, isic, *WITH_COSINE, "--trainer.callbacks=null"
        ),
        "ddpo": lambda folder: ddpo(folder, tiny_pipeline, tiny_classifiers, *few),
    }


@pytest.fixture(scope="module")
def first_turns(commands, tmp_path_factory):
    """A run of one epoch of each stage, moved away from where it was made."""
    made = tmp_path_factory.mktemp("made")
    kept = tmp_path_factory.mktemp("kept")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)
        for stage, command in commands.items():
            in_process(*command(made / stage), "--trainer.max_epochs=1")
            (made / stage).rename(kept / stage)
    return kept


@pytest.fixture
def second_turn(commands, first_turns, tmp_path, monkeypatch):
    """Runs a stage's command again, with other options, in a copy of its run folder."""
    monkeypatch.chdir(tmp_path)

    def run(stage, *options, epochs=1):
        folder = tmp_path / "elsewhere" / stage
        if not folder.exists():
            shutil.copytree(first_turns / stage, folder, symlinks=True)
        return in_process(*commands[stage](folder), f"--trainer.max_epochs={epochs}", *options)

    return run


def changed_tables(isic, folder, change):
    """A copy of an ISIC folder whose table of diseases is changed."""
    shutil.copytree(isic, folder)
    table = pd.read_csv(folder / TRUTH)
    change(table).to_csv(folder / TRUTH, index=False)
    return folder


def swapped(table):
    return table.rename(columns={"MEL": "NV", "NV": "MEL"})


def without_the_first(table):
    return table.iloc[1:]


@pytest.mark.parametrize("stage", ["classifier", "sd"])
@pytest.mark.parametrize("change", [swapped, without_the_first])
def test_other_tables_under_the_same_names_are_refused(second_turn, isic, tmp_path, stage, change):
    other = changed_tables(isic, tmp_path / "isic", change)
    options = (f"--data.root={other}", "--resume.allow=root")
    with pytest.raises(
        UserError, match=r"content of data\.tables: 4[45] \+ 9 images, digest"
    ) as error:
        second_turn(stage, *options)
    assert "--resume.allow '[tables]'" in str(error.value)
    assert "data.root" not in str(error.value).partition("To use")[2]


def test_prompts_drawn_from_the_training_images_depend_on_the_tables(isic, tmp_path):
    other = changed_tables(isic, tmp_path / "isic", swapped)
    one, same, two = (
        ISICPromptDataModule(str(root), prompts="train", split_seed=1).contents()
        for root in (isic, isic, other)
    )
    assert one == same != two
    assert ISICPromptDataModule(str(isic)).contents() == {}


@pytest.mark.parametrize("stage", ["classifier", "sd", "ddpo"])
def test_other_words_are_refused(second_turn, tmp_path, stage):
    words = tmp_path / "words.yaml"
    vocabulary = asdict(DERMOSCOPY) | {"words": DERMOSCOPY.words | {"ink": "a pen"}}
    words.write_text(yaml.safe_dump({"data": {"init_args": {"vocabulary": vocabulary}}}))
    with pytest.raises(UserError, match=r"data\.vocabulary\.words\.ink: .*a pen"):
        second_turn(stage, f"--config={words}")


def test_a_longer_run_has_another_schedule(second_turn, tmp_path):
    with pytest.raises(UserError, match=r"trainer\.max_epochs: 1 -> 2") as error:
        second_turn("classifier", epochs=2)
    assert "--resume.allow '[max_epochs]'" in str(error.value)
    with pytest.warns(UserWarning, match="max_epochs: 1 -> 2"):
        cli = second_turn("classifier", "--resume.allow=max_epochs", epochs=2)
    assert rates_of(cli) == [pytest.approx(cosine(12, step, 1e-4, 1e-6)) for step in (12,)]
    kept = last(tmp_path / "elsewhere" / "classifier")
    assert kept["lr_schedulers"][0]["T_max"] == 12


def test_an_allowed_schedule_goes_on_as_if_the_run_had_begun_with_it(second_turn):
    changed = ("--model.lr_scheduler.T_max=24", "--resume.allow=T_max")
    with pytest.warns(UserWarning, match="T_max: 6 -> 24"):
        cli = second_turn("sd", *changed, epochs=2)
    assert cli.trainer.global_step == 12
    assert rates_of(cli) == [pytest.approx(cosine(24, 12, 1e-5, 0.0))]


def rates_of(cli):
    return [group["lr"] for group in cli.trainer.optimizers[0].param_groups]


def cosine(length, step, highest, lowest):
    return lowest + (highest - lowest) * (1 + math.cos(math.pi * step / length)) / 2


@pytest.mark.parametrize("stage", ["classifier", "ddpo"])
def test_a_moved_run_keeps_its_best_checkpoint_and_is_exported(
    second_turn, first_turns, tmp_path, stage
):
    cli = second_turn(stage)
    best = next(c for c in cli.trainer.checkpoint_callbacks if c.monitor)
    assert best.best_model_path == str(tmp_path / "elsewhere" / stage / "checkpoints/best.ckpt")
    assert best.best_model_score is not None
    assert best.best_k_models == {best.best_model_path: best.best_model_score}
    if stage == "ddpo":
        (exported,) = (tmp_path / "elsewhere" / "ddpo" / "policy").glob("*.safetensors")
        before = load_file(first_turns / "ddpo" / "policy" / exported.name)
        assert differing(load_file(exported), before) == []


def test_own_checkpoints_without_a_folder_are_found(commands, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO", "lightning.pytorch")
    own = tmp_path / "own.yaml"
    own.write_text("trainer: {callbacks: [{class_path: ModelCheckpoint}]}")
    for stage in ("classifier", "sd"):
        few = "--trainer.limit_train_batches=1"
        command = [*commands[stage](tmp_path / stage), f"--config={own}", few]
        in_process(*command, "--trainer.max_epochs=1")
        cli = in_process(*command, "--trainer.max_epochs=1")
        assert (cli.trainer.global_step, cli.trainer.current_epoch) == (1, 1)
        assert list((tmp_path / stage / "checkpoints").glob("*.ckpt"))
    assert caplog.text.count("nothing was trained now") == 2
    with pytest.warns(UserWarning, match="keeps no checkpoints: it cannot be resumed"):
        in_process(
            *commands["sd"](tmp_path / "none"), "--trainer.max_epochs=1", few,
            "--trainer.enable_checkpointing=false", "--trainer.callbacks=null",
        )  # fmt: skip


def with_early_stopping(tmp_path, **options):
    path = tmp_path / "stop.yaml"
    listed = ", ".join(f"{key}: {value}" for key, value in options.items())
    path.write_text(
        "trainer: {callbacks: [{class_path: EarlyStopping, init_args: "
        f"{{monitor: val/loss, min_delta: 100.0, {listed}}}}}]}}"
    )
    return f"--config={path}"


@pytest.mark.parametrize("stage", ["classifier", "sd"])
def test_a_run_that_a_callback_ended_has_ended(commands, tmp_path, monkeypatch, caplog, stage):
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO", "lightning.pytorch")

    def fit(*options):
        short = ("--trainer.max_epochs=9", "--trainer.limit_train_batches=1")
        return in_process(*commands[stage](tmp_path / "run"), *short, *options)

    assert fit(with_early_stopping(tmp_path, patience=1)).trainer.current_epoch == 2
    cli = fit(with_early_stopping(tmp_path, patience=1))
    assert cli.trainer.global_step == 2
    for part in ("nothing was trained now", "val/loss", "change the options of EarlyStopping"):
        assert part in caplog.text
    longer = with_early_stopping(tmp_path, patience=3)
    assert fit(longer).trainer.current_epoch == 4


def test_a_run_whose_time_is_used_up_has_ended(commands, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO", "lightning.pytorch")

    def fit(time):
        command = commands["sd"](tmp_path / "run")
        short = ("--trainer.max_epochs=2", "--trainer.limit_train_batches=1")
        return in_process(*command, *short, f"--trainer.max_time={time}")

    assert fit("{milliseconds: 1}").trainer.global_step == 1
    assert fit("{milliseconds: 1}").trainer.global_step == 1
    assert "Its time (max_time) was used up" in caplog.text
    assert fit("{minutes: 9}").trainer.global_step == 2


def table(folder):
    (path,) = folder.rglob("metrics.csv")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    timed = ("time/", "epoch_seconds")
    return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in rows]


def test_averaged_weights_are_not_left_out_in_passing(second_turn, tmp_path):
    averaging = tmp_path / "averaging.yaml"
    averaging.write_text(
        "trainer: {callbacks: [{class_path: EMAWeightAveraging, init_args: {decay: 0.9}}]}"
    )
    for stage in ("classifier", "sd"):
        with pytest.raises(UserError, match=r"averaging: None -> EMAWeightAveraging"):
            second_turn(stage, f"--config={averaging}")


LOGGERS = """
trainer:
  logger:
    - class_path: TensorBoardLogger
      init_args: {{save_dir: "${{trainer.default_root_dir}}", name: tensorboard, version: ""}}
    - class_path: CSVLogger
      init_args: {{save_dir: "${{trainer.default_root_dir}}", version: {version}}}
"""


@pytest.mark.parametrize(
    ("stage", "turns", "version", "options"),
    [
        ("sd", (6, 9, 12), "null", ()),
        (
            "sd", (4, 6), "''",
            ("--trainer.accumulate_grad_batches=2", "--trainer.val_check_interval=2"),
        ),
        ("ddpo", (2, 4), "''", ()),
    ],
)  # fmt: skip
def test_a_run_cut_by_its_number_of_steps_ends_as_in_one_go(
    commands, tmp_path, monkeypatch, stage, turns, version, options
):
    """At the end of an epoch and within one; with the curves of TensorBoard and of a table."""
    monkeypatch.chdir(tmp_path)
    loggers = tmp_path / "loggers.yaml"
    loggers.write_text(LOGGERS.format(version=version))

    def fit(folder, steps):
        limits = ("--trainer.max_epochs=-1", f"--trainer.max_steps={steps}")
        in_process(*commands[stage](folder), f"--config={loggers}", *limits, *options)
        # the end of a turn has a grid of its own
        return everything(folder) | {"grids": None, "table": table(folder)}

    unbroken = fit(tmp_path / "unbroken", turns[-1])
    assert len(unbroken["table"]) > 2
    for steps in turns:
        broken = fit(tmp_path / "broken", steps)
    assert differing(broken, unbroken) == []
