"""Chest X-rays with four findings, by configuration alone."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image

from rl4med_ddpo.base_pipeline.build import build_pipeline
from rl4med_ddpo.command_line import main
from rl4med_ddpo.datamodules.vocabulary import Vocabulary
from rl4med_ddpo.foundation.errors import UserError
from rl4med_ddpo.lightning_modules.pipelines.load import save_pipeline
from support.tiny import TINY_NETWORKS

OVERLAY = "--config=chest_xray/vocabulary.yaml"
FINDINGS = ("effusion", "cardiomegaly", "pneumothorax", "device")


def run_every_stage(root, out, pipeline):
    """Describe the data, train every stage for an epoch, and score the policy."""
    data = [OVERLAY, f"--data.root={root}", f"--data.table={root}/labels.csv",
            "--data.images=xrays", "--data.split=lesion", "--data.size=16", "--data.batch_size=8",
            "--data.num_workers=0"]  # fmt: skip
    quiet = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false",
             "--trainer.enable_model_summary=false", "--trainer.logger=false"]  # fmt: skip
    short = [*quiet, "--trainer.max_epochs=1", "--trainer.limit_train_batches=2"]
    main(["describe", "--config=classifier.yaml", *data, "--model.attributes=null"])
    for name, backbone in (("classifier", "test_efficientnet"), ("judge", "test_resnet")):
        main(["fit", f"--config={name}.yaml", *data, *short, "--model.attributes=null",
              f"--data.copies={out}/copies", f"--model.backbone={backbone}",
              "--model.pretrained=false", "--model.image_size=32",
              f"--trainer.default_root_dir={out}/{name}"])  # fmt: skip
    main(["fit", "--config=sd.yaml", *data, *short, f"--model.pipeline={pipeline}",
          "--model.steps=2", "--trainer.precision=32-true",
          f"--trainer.default_root_dir={out}/sd"])  # fmt: skip
    ddpo = ["--config=ddpo.yaml", OVERLAY, "--data.root=null",
            f"--model.pipeline={out}/sd/pipeline", "--model.steps=2",
            f"--model.judge={out}/judge/checkpoints/best.ckpt", "--model.clip_range=0.1",
            f"--model.reward.classifier={out}/classifier/checkpoints/best.ckpt",
            "--data.validation_samples_per_prompt=1", "--data.test_samples_per_prompt=2",
            f"--trainer.default_root_dir={out}/ddpo"]  # fmt: skip
    main(["fit", *ddpo, *short, "--data.samples_per_epoch=32", "--model.updates=1",
          "--trainer.check_val_every_n_epoch=1"])  # fmt: skip
    main(["test", *ddpo, *quiet])
    main(["test", *ddpo, *quiet, "--model.policy=null",
          f"--trainer.default_root_dir={out}/sd"])  # fmt: skip
    return ddpo


@pytest.fixture
def xrays(tmp_path):
    """Forty-eight images of sixteen patients and their table."""
    root = tmp_path / "data"
    (root / "xrays").mkdir(parents=True)
    rng = np.random.default_rng(0)
    labels = pd.DataFrame(rng.integers(0, 2, (48, 4)), columns=FINDINGS)
    labels.insert(0, "image", [f"xray_{i:03d}" for i in range(48)])
    labels.insert(1, "group", [f"patient_{i // 3}" for i in range(48)])
    labels.to_csv(root / "labels.csv", index=False)
    for name in labels["image"]:
        Image.fromarray(rng.integers(0, 256, (20, 24), dtype=np.uint8)).save(
            root / "xrays" / f"{name}.png"
        )
    return root


@pytest.fixture(scope="module")
def long_pipeline(tmp_path_factory):
    """A tiny pipeline that reads prompts as long as Stable Diffusion does, by letters."""
    folder = tmp_path_factory.mktemp("pipeline") / "long"
    save_pipeline(build_pipeline(text_length=77, **TINY_NETWORKS), folder)
    return str(folder)


def test_every_stage_takes_another_vocabulary_and_table(
    xrays, long_pipeline, tiny_classifiers, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "runs"
    ddpo = run_every_stage(xrays, out, long_pipeline)
    said = capsys.readouterr().out
    assert "effusion + cardiomegaly + pneumothorax + device" in said
    assert "The 16 subgroups" in said
    checkpoint = torch.load(out / "classifier" / "checkpoints" / "best.ckpt", weights_only=True)
    assert tuple(checkpoint["hyper_parameters"]["vocabulary"]["any_of"]) == FINDINGS
    saved = yaml.safe_load((out / "ddpo" / "config_fit.yaml").read_text())
    assert tuple(saved["data"]["init_args"]["vocabulary"]["any_of"]) == FINDINGS
    scores = json.loads((out / "ddpo" / "results" / "metrics.json").read_text())
    assert scores["n"] == 32
    asked = [row["prompt"] for row in scores["prompts"].values()]
    assert len(set(asked)) == 16
    assert "a chest X-ray without findings" in asked
    assert "a chest X-ray showing pleural effusion, a support device" in asked
    card = (out / "ddpo" / "policy" / "README.md").read_text()
    assert "**Data:** a collection of chest X-rays" in card
    assert "CC-BY" not in card
    assert f"| apr | {scores['apr']:.4g}" in card
    main(["report", str(out)])
    tables = "".join(path.read_text() for path in (out / "report").glob("*.md"))
    assert "Table 2. APR" in tables
    for told in ("paper", "32", "melanoma"):
        assert told not in tables, told
    # other words are other prompts: the run does not go on with them without consent
    words = "--data.vocabulary.words.device=a pacemaker"
    with pytest.raises(UserError, match=r"data\.vocabulary\.words\.device: a support device -> a"):
        main(["fit", *ddpo, words, "--trainer.max_epochs=2", "--data.samples_per_epoch=32",
              "--model.updates=1", "--trainer.limit_train_batches=2"])  # fmt: skip
    # nor does a reward that reads dermoscopy judge chest X-rays
    with pytest.raises(UserError, match=r"others read\n.*hair, gel_bubble"):
        main(["test", *ddpo, f"--model.reward.classifier={tiny_classifiers['reward']}"])


def test_images_without_findings_and_findings_without_images(xrays, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    labels = pd.read_csv(xrays / "labels.csv")
    labels.loc[:24, list(FINDINGS)] = 0
    labels["device"] = 0
    labels.to_csv(xrays / "labels.csv", index=False)
    command = [
        "fit", "--config=classifier.yaml", OVERLAY, f"--data.root={xrays}",
        f"--data.table={xrays}/labels.csv", "--data.images=xrays", "--data.split=lesion",
        "--data.size=16", "--data.batch_size=8", "--data.num_workers=0", "--data.copies=null",
        "--data.sampler=balanced", "--model.attributes=null", "--model.backbone=test_efficientnet",
        "--model.pretrained=false", "--model.image_size=32", "--trainer.accelerator=cpu",
        "--trainer.max_epochs=1",
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"images with and without each attribute.*device 0"):
        main([*command, "--model.pos_weight=balanced"])
    cli = main(command)
    scores = cli.trainer.callback_metrics
    assert all(score.isfinite() for score in scores.values())
    assert "f1/device" not in {name.partition("/")[2] for name in scores}
    images = cli.datamodule.train_set.conditions
    drawn = [key % len(images) for key in cli.datamodule.train_dataloader().sampler]
    share = (images[drawn].sum(dim=1) == 0).float().mean()
    assert share > 0.1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"any_of": []}, "needs at least one"),
        ({"any_of": ["a", "a"]}, "must differ"),
        ({"any_of": ["a b"]}, "letters, digits and underscores"),
        ({"one_of": ["x"]}, "none or at least two"),
        ({"words": {"a": "an a"}}, "words lacks b"),
        ({"template": "an X-ray"}, r"template must have \{any_of\}"),
        ({"template": "an X-ray of {any_of} and {one_of}"}, r"template must have \{any_of\}, it"),
        ({"template_for_none": "{any_of}"}, "must have no braces"),
        ({"template": "broken {any_of"}, "template must have"),
    ],
)
def test_a_vocabulary_of_which_no_prompts_can_be_made(change, says):
    good = {
        "any_of": ["a", "b"], "words": {"a": "an a", "b": "a b"},
        "template": "with {any_of}", "template_for_none": "with none",
    }  # fmt: skip
    assert Vocabulary(**good).prompts == ("with none", "with an a", "with a b", "with an a, a b")
    with pytest.raises(UserError, match=says):
        Vocabulary(**{**good, **change})


def test_the_former_variable_is_refused_with_what_replaced_it(monkeypatch):
    monkeypatch.setenv("ATTRIBUTES", "configs/chest_xray/attributes.yaml")
    with pytest.raises(UserError, match=r"data\.init_args\.vocabulary"):
        main(["fit", "--config=classifier.yaml"])
