"""Scores do not depend on how many processes counted them."""

import csv
import json
from pathlib import Path

import pytest

from support.command_line import ROOT, classifier, ddpo, fine_tuning, in_process
from support.forked import forked_ranks

ONE_PROMPT = (
    "--data.prompts=[a dermoscopic image with melanoma (MEL) with no visible artifacts]",
    "--data.root=null",
    "--data.samples_per_epoch=4",
    "--data.test_samples_per_prompt=3",
    "--model.updates=1",
    "--model.steps=2",
)


@pytest.fixture(scope="module")
def options(tiny_pipeline, tiny_classifiers, isic, tmp_path_factory):
    """The options of each stage, with the weights to score."""
    run = tmp_path_factory.mktemp("run")
    few, as_it_is = "--data.batch_size=2", "--ckpt_path=null"
    return {
        "classifier": [
            *classifier(run, isic, few)[1:], f"--ckpt_path={tiny_classifiers['reward']}",
        ],
        "sd": [*fine_tuning(run, tiny_pipeline, isic, few)[1:], as_it_is],
        "autoencoder": [
            f"--config={ROOT}/configs/base/autoencoder.yaml",
            f"--model.pipeline={tiny_pipeline}", f"--model.perceptual={tiny_classifiers['reward']}",
            *classifier(run, isic, few)[5:], as_it_is,
        ],
        "ddpo": [
            *ddpo(run, tiny_pipeline, tiny_classifiers, *ONE_PROMPT)[1:], "--model.policy=null",
            as_it_is,
        ],
    }  # fmt: skip


def scores(folder):
    """The last value of each score in the table of curves, by name."""
    (path,) = folder.rglob("metrics.csv")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = {name: value for row in rows for name, value in row.items() if value}
    return {n: float(v) for n, v in found.items() if n.startswith(("val/", "test/"))}


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
    options, tmp_path, monkeypatch, stage, subcommand, processes
):
    monkeypatch.chdir(tmp_path)
    found = []
    for ranks in processes:
        logged = tmp_path / f"on_{ranks}"
        args = [
            subcommand, *options[stage], f"--trainer.devices={ranks}",
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
        (run,) = (o.partition("=")[2] for o in options[stage] if "default_root_dir" in o)
        kept = json.loads(Path(run, "results", "metrics.json").read_text())
        assert kept["n"] == alone["test/n"]
