"""The real command line at a size that runs in seconds."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

from rl4med_ddpo.command_line import main
from support.dermoscopy import PROMPTS

ROOT = Path(__file__).parents[2]


SHIPPED = yaml.safe_load((ROOT / "configs" / "ddpo.yaml").read_text())["trainer"]["callbacks"]
CALLBACKS = [callback for callback in SHIPPED if callback["class_path"] != "SampleGrid"]
# as long as this process: references are resolved in a file alone
WITHOUT_GRIDS = tempfile.NamedTemporaryFile("w", suffix=".yaml")
WITHOUT_GRIDS.write(yaml.safe_dump({"trainer": {"callbacks": CALLBACKS}}))
WITHOUT_GRIDS.flush()


def ddpo(folder, pipeline, classifiers, *more, grids=False):
    """Options that make ddpo.yaml tiny; the pictures in between take most of a tiny run's time."""
    own = ("--model.steps=4", "--model.clip_range=0.01", "--model.std_floor=0.01")
    return _rewarded("ddpo.yaml", folder, pipeline, classifiers, *own, *more, grids=grids)


def draft(folder, pipeline, classifiers, *more):
    """Options that make draft.yaml tiny: of 16 images, 2 steps an epoch."""
    own = ("--model.steps=2", "--model.updates=2")
    return _rewarded("draft.yaml", folder, pipeline, classifiers, *own, *more)


def _rewarded(configuration, folder, pipeline, classifiers, *more, grids=False):
    return [
        "fit",
        f"--config={configuration}",
        f"--model.pipeline={pipeline}",
        f"--model.judge={classifiers['judge']}",
        f"--model.reward.classifier={classifiers['reward']}",
        "--model.guidance=3.0",
        f"--data.prompts=[{', '.join(map(repr, PROMPTS[::8]))}]",
        "--data.samples_per_epoch=16",
        "--data.validation_samples_per_prompt=1",
        f"--trainer.default_root_dir={folder}",
        "--trainer.accelerator=cpu",
        "--trainer.check_val_every_n_epoch=2",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        *([] if grids else [f"--config={WITHOUT_GRIDS.name}"]),
        *more,
    ]


QUIET = (
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
)


def classifier(folder, isic, *more):
    """Options that make classifier.yaml tiny: of 64 images, 6 steps an epoch."""
    return [
        "fit", "--config=classifier.yaml", "--model.backbone=test_efficientnet",
        "--model.pretrained=false", "--model.image_size=32", "--data.copies=null",
        *_images(folder, isic), *QUIET, *more,
    ]  # fmt: skip


def fine_tuning(folder, pipeline, isic, *more):
    """Options that make sd.yaml tiny: of 64 images, 6 steps an epoch."""
    return [
        "fit", "--config=sd.yaml", f"--model.pipeline={pipeline}", "--model.steps=2",
        "--model.cache=null", *_images(folder, isic), *QUIET, *more,
    ]  # fmt: skip


def _images(folder, isic):
    return [
        f"--data.root={isic}", "--data.size=16", "--data.batch_size=8", "--data.num_workers=0",
        f"--trainer.default_root_dir={folder}",
    ]  # fmt: skip


def in_process(*args):
    """Run the command line here."""
    return main(list(args))


def as_process(cwd, *args):
    """Run `python run.py` as a user does."""
    return subprocess.run(
        [sys.executable, str(ROOT / "run.py"), *args],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT / "tests")},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )


def start_process(cwd, *args, **variables):
    """Start `python run.py` in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "run.py"), *args],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT / "tests")} | variables,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
