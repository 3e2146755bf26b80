"""Scores over guidance, by the real command line, and by a judge that reads the whole prompt."""

import json

import pandas as pd
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rl4med_ddpo.foundation.errors import UserError
from support.command_line import ddpo, in_process
from support.dermoscopy import ATTRIBUTES
from support.forked import forked, forked_ranks
from support.tiny import fitted

GUIDANCES = ("--frontier.guidances=[1, 3]", "--frontier.samples_per_prompt=2")


@pytest.fixture(scope="module")
def networks(tiny_classifiers, tmp_path_factory):
    """The judge has all six heads."""
    file = tmp_path_factory.mktemp("judge") / "judge.ckpt"
    return tiny_classifiers | {"judge": fitted(file, "test_resnet", ATTRIBUTES, seed=2)}


@pytest.fixture(scope="module")
def options(tiny_pipeline, networks, isic):
    def made(folder, *more):
        given = (
            f"--data.root={isic}", "--data.num_workers=0", "--data.test_samples_per_prompt=2",
            "--data.predict_batch_size=4", "--model.sample_batch=4", "--model.steps=2",
            "--model.policy=null", "--ckpt_path=null",
        )  # fmt: skip
        return ["test", *ddpo(folder, tiny_pipeline, networks, *given, *more)[1:]]

    return made


@pytest.fixture(scope="module")
def measured(options, tmp_path_factory):
    folder = tmp_path_factory.mktemp("measured")
    assert forked(in_process, *options(folder, *GUIDANCES)) == 0
    return folder


def read(folder, name="frontier.json"):
    return json.loads((folder / "results" / name).read_text())


def test_at_the_run_s_own_guidance_it_scores_what_test_scores(measured):
    result, scores = read(measured), read(measured, "metrics.json")
    one, own = result["points"]
    assert (one["guidance"], own["guidance"]) == (1.0, 3.0)
    for score in ("apr", "reward", "n"):
        assert own[score] == pytest.approx(scores[score], abs=1e-6)
    assert own["distance"]["value"] != one["distance"]["value"]
    asked = {entry["prompt"]: entry["apr"] for entry in scores["prompts"].values() if entry["n"]}
    assert list(own["prompts"].values()) == list(asked.values())
    assert result["best_guidance"] == max((one, own), key=lambda p: p["val_apr"])["guidance"]
    assert result["model"] == "SD"
    assert result["real"]["n"] > 5
    assert (measured / "results" / "frontier.png").stat().st_size > 10_000
    (events,) = (measured / "tensorboard").glob("events*")
    assert "test/frontier" in EventAccumulator(str(events)).Reload().Tags()["images"]


def test_a_judge_of_all_attributes_reads_them_instead_of_the_reward(measured):
    table = pd.read_csv(measured / "samples" / "manifest.csv")
    read_right = (table[[f"judge_{a}" for a in ATTRIBUTES]].to_numpy() > 0.5) == (
        table[list(ATTRIBUTES)].to_numpy() == 1
    )
    scores = read(measured, "metrics.json")
    assert scores["apr6"]["read_by"] == "judge"
    assert scores["apr6"]["correct"] == read_right.all(axis=1).sum()
    assert scores["correct"] == read_right[:, :4].all(axis=1).sum()
    leaks = pd.read_csv(measured / "results" / "leakage.csv", index_col="prompt")
    shown = table["judge_NV"].gt(0.5).groupby(table["prompt"]).mean()
    assert sorted(leaks["NV"].dropna()) == sorted(shown)


def test_started_again_it_draws_what_is_missing_on_any_number_of_processes(
    measured, options, monkeypatch
):
    before = read(measured)
    kept = sorted((measured / "results" / "frontier").iterdir())
    assert [file.name for file in kept] == ["guidance_1.json", "guidance_3.json"]
    kept[0].unlink()
    (measured / "results" / "frontier.json").unlink()
    untouched = kept[1].stat().st_mtime_ns
    two = ("--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.logger=false")
    assert forked_ranks(in_process, *options(measured, *GUIDANCES, *two)) == [0, 0]
    assert read(measured) == before
    assert kept[1].stat().st_mtime_ns == untouched


def test_validation_logs_what_the_judge_makes_of_the_whole_prompt(options, tmp_path):
    trainer = in_process("validate", *options(tmp_path)[1:], "--trainer.logger=false").trainer
    logged = trainer.callback_metrics
    assert 0 <= logged["val/apr6"] <= logged["val/apr"] <= 1


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--frontier.guidances=[1, -3]"], "guidances are at least 0"),
        (["--frontier.guidances=[2, 2]"], "each given once"),
        ([*GUIDANCES, "--data.validation_samples_per_prompt=0"], "validation_samples_per_prompt"),
        ([*GUIDANCES, "--data.root=null"], "--data.root or --frontier.real"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_drawn(options, tmp_path, given, says):
    with pytest.raises(UserError, match=says):
        in_process(*options(tmp_path, *given))
    assert not list(tmp_path.rglob("*.png"))
