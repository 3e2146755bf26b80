import json

import numpy as np
import pandas as pd
import pytest

from rl4med_ddpo.command_line import main
from rl4med_ddpo.datamodules.dermoscopy import DermoscopyFolder
from rl4med_ddpo.datamodules.isic import ISICDataModule
from rl4med_ddpo.lightning_modules.classifier import load_classifier


@pytest.fixture(scope="module")
def isic(tmp_path_factory):
    root = tmp_path_factory.mktemp("isic") / "data"
    DermoscopyFolder(root, images=100, size=16).write()
    return root


def predictions_of(folder, isic, checkpoint, *more):
    main([
        "test", "--config=demo/classifier.yaml", f"--data.root={isic}", "--data.size=16",
        "--data.batch_size=4", "--model.image_size=32", f"--ckpt_path={checkpoint}",
        f"--trainer.default_root_dir={folder}", "--trainer.logger=false",
        "--trainer.enable_progress_bar=false", "--trainer.callbacks.arm=sd", *more,
    ])  # fmt: skip
    results = json.loads((folder / "results" / "metrics.json").read_text())
    return pd.read_csv(folder / "results" / "predictions.csv"), results


def test_predictions_are_the_networks_and_do_not_depend_on_the_processes(
    isic, tiny_classifiers, tmp_path
):
    checkpoint = tiny_classifiers["reward"]
    one, results = predictions_of(tmp_path / "one", isic, checkpoint)
    two, _ = predictions_of(
        tmp_path / "two", isic, checkpoint, "--trainer.devices=2", "--trainer.strategy=ddp_fork"
    )
    assert one["id"].tolist() == two["id"].tolist() == sorted(one["id"])
    assert len(one) == results["n"] == 15
    said = [c for c in one if c.startswith("p_")]
    np.testing.assert_allclose(one[said], two[said], atol=1e-6)
    test = ISICDataModule(str(isic), size=16).dataset("test")
    classifier = load_classifier(checkpoint)
    for item in test:
        row = one.set_index("id").loc[item["id"]]
        expected = classifier(item["image"][None])[0].sigmoid()
        np.testing.assert_allclose(row[said].astype(float), expected, atol=1e-5)
        assert row[["hair", "gel_bubble", "ruler", "ink", "MEL", "NV"]].tolist() == (
            item["condition"].int().tolist()
        )
    assert (results["kind"], results["arm"], results["seed"]) == ("classifier", "sd", 0)
    assert results["provenance"]["data"]["images"]["test"] == 15
    assert not list((tmp_path / "two" / "results").glob("*.part.csv"))
