"""One step of each stage with the full-size networks, random weights, within 24 GiB.

    python -m pytest -m slow -s tests/test_full_size_steps.py

needs 24 GiB of memory, 9 GB of disk and some minutes; prints seconds and peak memory of each stage.
"""

import json
import subprocess
import sys

import pytest
from lightning import seed_everything

from rl4med_ddpo.base_pipeline.full_size import build_full_size
from rl4med_ddpo.datamodules.dermoscopy import DermoscopyFolder
from support.command_line import ROOT
from support.dermoscopy import ARTIFACTS, ATTRIBUTES
from support.tiny import fitted

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

LIMIT = 24 * 2**30
MEASURED = """
import json, resource, sys, time
import rl4med_ddpo.command_line
started = time.monotonic()
run.main(sys.argv[2:])
kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with open(sys.argv[1], "w") as file:
    json.dump({"seconds": time.monotonic() - started, "peak": kilobytes * 1024}, file)
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The full-size pipeline, images to train on, and classifiers of random weights."""
    folder = tmp_path_factory.mktemp("full_size")
    build_full_size(folder / "pipeline")
    DermoscopyFolder(folder / "isic", images=40, size=512).write()
    return folder


def step(folder, name, *options):
    """Run one optimizer step of a shipped configuration, in a process of its own."""
    report = folder / f"{name}.json"
    arguments = [
        "fit", *options, "--trainer.accelerator=cpu", f"--trainer.default_root_dir={folder / name}",
        "--trainer.max_epochs=1", "--trainer.limit_train_batches=1",
        "--trainer.limit_val_batches=0", "--trainer.num_sanity_val_steps=0",
        "--trainer.enable_progress_bar=false", "--trainer.logger=false",
        # no grids, which cost more than the step, and no checkpoints of 10 GB
        "--trainer.callbacks=null", "--trainer.enable_checkpointing=false",
    ]  # fmt: skip
    command = [sys.executable, "-c", MEASURED, str(report), *arguments]
    subprocess.run(command, cwd=ROOT, check=True)
    measured = json.loads(report.read_text())
    print(f"\n{name}: {measured['seconds']:.0f} s, {measured['peak'] / 2**30:.1f} GiB")
    assert measured["peak"] < LIMIT
    return measured


def data(folder):
    return [f"--data.root={folder / 'isic'}", "--data.num_workers=0"]


def test_classifier(made):
    step(
        made, "classifier", "--config=classifier.yaml", *data(made), "--model.pretrained=false",
        "--data.copies=null",
    )  # fmt: skip


@pytest.mark.parametrize("train", ["lora", "full"])
def test_fine_tuning(made, train):
    step(
        made, f"sd {train}", "--config=sd.yaml", *data(made), f"--model.train={train}",
        f"--model.pipeline={made / 'pipeline'}", "--model.cache=null", "--data.batch_size=1",
        "--model.gradient_checkpointing=true",
    )  # fmt: skip


def test_ddpo(made):
    seed_everything(0, verbose=False)
    reward = fitted(made / "reward.ckpt", "efficientnet_b0", ATTRIBUTES, seed=1)
    judge = fitted(made / "judge.ckpt", "resnet50", ARTIFACTS, seed=2)
    step(
        made, "ddpo lora", "--config=ddpo.yaml", f"--model.pipeline={made / 'pipeline'}",
        f"--model.judge={judge}", f"--model.reward.classifier={reward}", "--model.steps=2",
        "--model.updates=1", "--model.sample_batch=1", "--model.micro_batch=1",
        "--data.prompts=[a dermoscopic image with melanoma (MEL) with no visible artifacts]",
        "--data.samples_per_epoch=2", "--data.root=null", "--model.baseline=none",
    )  # fmt: skip
