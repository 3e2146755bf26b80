import csv
import json
from pathlib import Path

import lightning as L
import pytest

from rl4med_ddpo.callbacks import Evaluation
from rl4med_ddpo.callbacks.feature_networks import ALEXNET, INCEPTION
from rl4med_ddpo.command_line import main
from rl4med_ddpo.datamodules.dermoscopy import DermoscopyFolder
from rl4med_ddpo.foundation.errors import UserError
from support.sample_runs import command, contents, times


@pytest.fixture(scope="module")
def isic(tmp_path_factory):
    root = tmp_path_factory.mktemp("isic") / "data"
    DermoscopyFolder(root, images=160, size=16, combinations="balanced").write()
    return root


@pytest.fixture(scope="module")
def networks(tiny_pipeline, tiny_classifiers):
    return {"pipeline": tiny_pipeline, **tiny_classifiers}


def evaluate(folder, networks, isic, *more):
    options = command(folder, networks, f"--data.root={isic}", "--data.test_samples_per_prompt=4")
    main(["test", *options[1:], "--trainer.enable_progress_bar=false", *more])
    return json.loads((folder / "results" / "metrics.json").read_text())


@pytest.fixture(scope="module")
def scored(networks, isic, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scored")
    return folder, evaluate(folder, networks, isic)


def recount(folder):
    """APR from the manifest alone: nothing of ours is imported."""
    artifacts = ("hair", "gel_bubble", "ruler", "ink")
    correct, asked, six = {}, {}, 0
    with open(folder / "samples" / "manifest.csv") as file:
        for row in csv.DictReader(file):
            prompt = row["prompt"]
            wrong = sum((float(row[f"judge_{a}"]) > 0.5) != (row[a] == "1") for a in artifacts)
            misread = sum(
                (float(row[f"reward_{a}"]) > 0.5) != (row[a] == "1")
                for a in (*artifacts, "MEL", "NV")
            )
            asked[prompt] = asked.get(prompt, 0) + 1
            correct[prompt] = correct.get(prompt, 0) + (wrong == 0)
            six += misread == 0
    return correct, asked, six


def test_apr_equals_a_recount_from_the_manifest(scored):
    folder, results = scored
    correct, asked, six = recount(folder)
    assert len(asked) == 32
    assert results["n"] == sum(asked.values()) == 128
    assert results["correct"] == sum(correct.values()) > 0
    assert results["apr"] == sum(correct.values()) / 128
    assert results["apr6"]["correct"] == six
    for entry in results["prompts"].values():
        assert entry["correct"] == correct[entry["prompt"]]
        assert entry["n"] == asked[entry["prompt"]]
        low, high = entry["apr_interval"]
        assert low <= entry["apr"] <= high
    alone = "a dermoscopic image with melanoma (MEL) showing ink"
    assert results["table_2"]["MEL+ink"]["correct"] == correct[alone]


def test_every_number_says_what_it_rests_on(scored):
    _, results = scored
    provenance = results["provenance"]
    for name in ("judge", "reward"):
        assert len(provenance[name]["digest"]) == 16
    assert provenance["judge"]["digest"] != provenance["reward"]["digest"]
    assert provenance["data"]["images"] == {"train": 115, "val": 21, "test": 24}
    assert {"torch", "torch-fidelity", "lpips"} <= provenance["versions"].keys()
    network = results["features"]["classifier"]
    assert network["digest"] == provenance["judge"]["digest"]
    assert "antialiased" in network["resize"]
    distances = results["distribution"]["classifier"]
    assert next(iter(distances)) == "kernel"
    for name in ("kernel", "frechet", "noise_floor", "frechet_equal_n", "frechet_real_mix"):
        assert {"value", "interval", "n", "n_real"} <= distances[name].keys(), name
    # 24 real images do not make a covariance of 96 dimensions
    assert "trust the kernel distance" in distances["frechet"]["flag"]
    assert len(results["real"]["prompts"]) == 32
    assert sum(entry["n"] for entry in results["real"]["prompts"].values()) == 24
    assert results["real"]["prompts"]["MEL"]["flag"] in ("not estimable", "n < 30")


def test_what_cannot_be_had_says_what_to_fetch_and_where_to_put_it(scored):
    _, results = scored
    for metric, weights in (("fid", INCEPTION), ("kid", INCEPTION), ("lpips", ALEXNET)):
        said = results["unavailable"][metric]
        assert weights.url in said
        assert str(weights.cached).replace(str(Path.home()), "~", 1) in said
    assert results["lpips"]["value"] is None
    assert results["lpips"]["n"] > 0
    assert "inception" not in results["distribution"]


def test_scores_do_not_depend_on_processes_workers_or_what_was_there(
    networks, isic, scored, tmp_path
):
    folder, results = scored
    two = ("--trainer.devices=2", "--trainer.strategy=ddp_fork")
    evaluate(tmp_path / "two", networks, isic, *two, "--data.num_workers=1")
    predicted = tmp_path / "predicted"
    options = command(predicted, networks, "--data.test_samples_per_prompt=4")
    main(options)
    drawn = times(predicted / "samples")
    evaluate(predicted, networks, isic)
    assert times(predicted / "samples") == drawn
    for other in (tmp_path / "two", predicted):
        assert contents(other / "samples") == contents(folder / "samples")
        found = json.loads((other / "results" / "metrics.json").read_text())
        found["provenance"]["samples_folder"] = results["provenance"]["samples_folder"]
        assert found == results
        for name in ("leakage.csv", "nearest.csv", "nearest.png"):
            assert (other / "results" / name).read_bytes() == (
                folder / "results" / name
            ).read_bytes()


def rewarded(options, overlay, *rewards):
    """Options with a sum of rewards in place of the classifier's."""
    init_args = {"rewards": list(rewards), "weights": [0.5] * len(rewards)}
    reward = {"class_path": "RewardSum", "init_args": init_args}
    overlay.write_text(json.dumps({"model": {"init_args": {"reward": reward}}}))
    at = options.index("--model.reward.classifier")
    first, kept = options[:3], options[3:at] + options[at + 2 :]
    return [*first, "--config", str(overlay), *kept]


def test_a_wrapped_reward_is_read_and_hashed_as_itself(networks, scored, tmp_path):
    folder, results = scored
    options = command(tmp_path / "run", networks, "--data.root=null")
    match = {"class_path": "AttributeMatch", "init_args": {"classifier": networks["reward"]}}
    whole = rewarded(options, tmp_path / "sum.yaml", {"class_path": "Brightness"}, match)
    main(["test", *whole[1:], "--data.test_samples_per_prompt=4"])
    found = json.loads((tmp_path / "run" / "results" / "metrics.json").read_text())
    assert found["apr6"] == results["apr6"]
    assert found["provenance"]["reward"] == {
        "class": "RewardSum(0.5 Brightness + 0.5 AttributeMatch)",
        "digest": results["provenance"]["reward"]["digest"],
    }
    matrix, wrapped = (
        (run / "results" / "leakage.csv").read_bytes() for run in (folder, tmp_path / "run")
    )
    assert matrix == wrapped


def test_a_reward_of_another_form_is_refused_before_anything_is_drawn(networks, tmp_path):
    listed = {"class_path": "support.own_rewards.Listed"}
    for verb in ("predict", "fit"):
        options = command(tmp_path / verb, networks)
        whole = rewarded(options, tmp_path / "sum.yaml", listed)
        with pytest.raises(UserError, match="the reward Listed returned, for 3 images: list of 3"):
            main([verb, *whole[1:]])
        assert not (tmp_path / verb / "samples").exists()
        assert not (tmp_path / verb / "checkpoints").exists()


def test_a_given_file_that_is_not_there_is_refused(networks, isic, tmp_path):
    options = command(tmp_path, networks, f"--data.root={isic}")
    with pytest.raises(UserError, match=r"there is no file nowhere\.pth.*fetch https://"):
        main(["test", *options[1:], "--trainer.callbacks.alexnet=nowhere.pth"])


def test_without_a_folder_of_samples_there_is_nothing_to_score(tmp_path):
    trainer = L.Trainer(accelerator="cpu", logger=False, callbacks=[Evaluation()])
    with pytest.raises(UserError, match="put a SampleFolder before it"):
        Evaluation.on_test_start(trainer.callbacks[-1], trainer, None)
