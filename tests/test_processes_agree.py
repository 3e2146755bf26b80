"""Scores do not depend on how many processes counted them."""

import csv
import json
from pathlib import Path

import pytest

from rl4med_ddpo.datamodules.dermoscopy import DermoscopyFolder
from support.command_line import ROOT, classifier, ddpo, fine_tuning, in_process
from support.forked import forked, forked_ranks

ONE_PROMPT = (
    "--data.prompts=[a dermoscopic image with melanoma (MEL) with no visible artifacts]",
    "--data.root=null",
    "--data.samples_per_epoch=4",
    "--data.test_samples_per_prompt=3",
    "--model.updates=1",
    "--model.steps=2",
)


@pytest.fixture(scope="module")
def isic(tmp_path_factory):
    """Sixty-four images, of which nine are validation's and eleven the test's."""
    root = tmp_path_factory.mktemp("isic") / "data"
    DermoscopyFolder(root, images=64, size=16, combinations="balanced").write()
    return root


@pytest.fixture(scope="module")
def commands(tiny_pipeline, tiny_classifiers, isic):
    """The options of each stage, as a function of the run folder."""
    return {
        "classifier": lambda folder: classifier(folder, isic, "--data.batch_size=2"),
        "sd": lambda folder: fine_tuning(folder, tiny_pipeline, isic, "--data.batch_size=2"),
        "autoencoder": lambda folder: [
            "fit", f"--config={ROOT}/configs/base/autoencoder.yaml",
            f"--model.pipeline={tiny_pipeline}", f"--model.perceptual={tiny_classifiers['reward']}",
            *classifier(folder, isic, "--data.batch_size=2")[5:], "--trainer.val_check_interval=2",
        ],
        "ddpo": lambda folder: ddpo(folder, tiny_pipeline, tiny_classifiers, *ONE_PROMPT),
    }  # fmt: skip


def scores(folder):
    """The last value of each score in the table of curves, by name."""
    (path,) = folder.rglob("metrics.csv")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = {name: value for row in rows for name, value in row.items() if value}
    return {n: float(v) for n, v in found.items() if n.startswith(("val/", "test/"))}


@pytest.fixture(scope="module")
def fitted(commands, tmp_path_factory):
    """Gives the options of a stage that has a run of two batches; they name its folder."""
    made, options = tmp_path_factory.mktemp("fitted"), {}
    short = ("--trainer.max_epochs=1", "--trainer.limit_train_batches=2")

    def options_of(stage):
        if stage not in options:
            _, *options[stage] = commands[stage](made / stage)
            assert forked(in_process, "fit", *options[stage], *short) == 0
        return options[stage]

    return options_of


@pytest.mark.parametrize(
    ("stage", "subcommand", "processes"),
    [
        ("classifier", "test", (1, 2, 4)),
        ("sd", "validate", (1, 2)),
        ("autoencoder", "validate", (1, 2)),
        # of one prompt and one image, which one process draws alone
        ("ddpo", "validate", (1, 2)),
    ],
)
def test_scores_do_not_depend_on_the_number_of_processes(
    fitted, tmp_path, monkeypatch, stage, subcommand, processes
):
    monkeypatch.chdir(tmp_path)
    options, found = fitted(stage), []
    for ranks in processes:
        logged = tmp_path / f"on_{ranks}"
        args = [
            subcommand, *options, f"--trainer.devices={ranks}",
            f"--trainer.strategy={'ddp' if ranks > 1 else 'auto'}", "--trainer.logger=CSVLogger",
            f"--trainer.logger.save_dir={logged}",
        ]  # fmt: skip
        assert forked_ranks(in_process, *args, ranks=ranks) == [0] * ranks
        found.append(scores(logged))
    alone, *shared = found
    assert len(alone) >= (1 if stage == "sd" else 2)
    for together in shared:
        assert together == pytest.approx(alone, abs=1e-5)
    if (stage, subcommand) == ("classifier", "test"):
        run = Path(next(o for o in options if "default_root_dir" in o).partition("=")[2])
        kept = json.loads((run / "results" / "metrics.json").read_text())
        assert kept["n"] == alone["test/n"]
