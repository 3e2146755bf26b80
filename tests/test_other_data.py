"""Chest X-rays with four findings, by configuration alone."""

import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from rl4med_ddpo.datamodules.attributes import _chosen
from rl4med_ddpo.datamodules.vocabulary import DERMOSCOPY, read_vocabulary
from rl4med_ddpo.foundation.errors import UserError
from support.command_line import ROOT

ATTRIBUTES = ROOT / "configs" / "chest_xray" / "attributes.yaml"
FINDINGS = ("effusion", "cardiomegaly", "pneumothorax", "device")

STAGES = """
import sys
import rl4med_ddpo.command_line
root, out, pipeline = sys.argv[1:]
data = [f"--data.root={root}", f"--data.table={root}/labels.csv", "--data.images=xrays",
        "--data.split=lesion", "--data.size=16", "--data.batch_size=8", "--data.num_workers=0"]
quiet = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false",
         "--trainer.enable_model_summary=false", "--trainer.logger=false"]
short = [*quiet, "--trainer.max_epochs=1", "--trainer.limit_train_batches=2"]
findings = "--model.attributes=[effusion, cardiomegaly, pneumothorax, device]"
run.main(["describe", "--config=classifier.yaml", findings, *data])
for name, backbone in (("classifier", "test_efficientnet"), ("judge", "test_resnet")):
    run.main(["fit", f"--config={name}.yaml", *data, *short, findings,
              f"--data.copies={out}/copies",
              f"--model.backbone={backbone}", "--model.pretrained=false",
              "--model.image_size=32", f"--trainer.default_root_dir={out}/{name}"])
run.main(["fit", "--config=sd.yaml", *data, *short, f"--model.pipeline={pipeline}",
          "--model.steps=2", "--trainer.precision=32-true", f"--trainer.default_root_dir={out}/sd"])
ddpo = ["--config=ddpo.yaml", "--data.root=null", f"--model.pipeline={out}/sd/pipeline",
        "--model.steps=2",
        f"--model.judge={out}/judge/checkpoints/best.ckpt", "--model.clip_range=0.1",
        f"--model.reward.classifier={out}/classifier/checkpoints/best.ckpt",
        "--data.validation_samples_per_prompt=1", "--data.test_samples_per_prompt=2",
        f"--trainer.default_root_dir={out}/ddpo"]
run.main(["fit", *ddpo, *short, "--data.samples_per_epoch=32", "--model.updates=1",
          "--trainer.check_val_every_n_epoch=1"])
run.main(["test", *ddpo, *quiet])
"""


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


def test_every_stage_takes_another_vocabulary_and_table(xrays, tiny_pipeline, tmp_path):
    out = tmp_path / "runs"
    done = subprocess.run(
        [sys.executable, "-c", STAGES, str(xrays), str(out), tiny_pipeline],
        cwd=tmp_path,
        env=os.environ | {"ATTRIBUTES": str(ATTRIBUTES), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "effusion + cardiomegaly + pneumothorax + device" in done.stdout
    assert "The 16 subgroups" in done.stdout
    checkpoint = torch.load(out / "classifier" / "checkpoints" / "best.ckpt", weights_only=True)
    assert tuple(checkpoint["hyper_parameters"]["attributes"]) == FINDINGS
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


def test_the_shipped_example_and_the_default_are_sound(tmp_path):
    assert read_vocabulary(ATTRIBUTES).any_of == FINDINGS
    # the default, written down and read back, is itself
    fields = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(DERMOSCOPY).items()}
    (tmp_path / "same.yaml").write_text(json.dumps(fields))
    assert read_vocabulary(tmp_path / "same.yaml") == DERMOSCOPY


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"any_of": []}, "needs any_of"),
        ({"colour": "blue"}, "allowed are any_of, one_of"),
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
def test_a_set_of_which_no_prompts_can_be_made(tmp_path, change, says):
    good = {
        "any_of": ["a", "b"], "words": {"a": "an a", "b": "a b"},
        "template": "with {any_of}", "template_for_none": "with none",
    }  # fmt: skip
    (tmp_path / "set.yaml").write_text(json.dumps(good))
    assert read_vocabulary(tmp_path / "set.yaml").one_of == ()
    (tmp_path / "set.yaml").write_text(json.dumps(good | change))
    with pytest.raises(UserError, match=says):
        read_vocabulary(tmp_path / "set.yaml")


def test_a_set_that_is_not_there_is_an_error_without_traceback(monkeypatch, capsys):
    monkeypatch.setenv("ATTRIBUTES", "gone.yaml")
    with pytest.raises(SystemExit) as end:
        _chosen()
    assert end.value.code == 2
    assert "error: cannot read the attributes gone.yaml" in capsys.readouterr().err
