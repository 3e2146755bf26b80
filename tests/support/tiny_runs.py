"""Tiny DDPO runs, and all that they leave, for comparison bit by bit."""

import re

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rl4med_ddpo.callbacks import RewardPlateau, SampleGrid
from rl4med_ddpo.command_line import Trainer
from rl4med_ddpo.fault_tolerance.checkpoint_io import DurableCheckpointIO
from rl4med_ddpo.fault_tolerance.logger_resume import LoggerResume
from rl4med_ddpo.fault_tolerance.preemption import Preemption
from rl4med_ddpo.fault_tolerance.resume import Resume
from rl4med_ddpo.fault_tolerance.run_folder import DiskSpaceCheck
from rl4med_ddpo.lightning_modules import DDPO
from support.dermoscopy import PROMPTS
from support.tiny import prompts, tiny_ddpo

EPOCHS = 3


def trainer_of(folder, callbacks=(), every_n_epochs=1, allow=None, **options):
    """A trainer as the command line makes it of the shipped configurations."""
    newest = checkpoint(
        folder, filename="newest", save_last="link", save_on_train_epoch_end=True,
        every_n_epochs=every_n_epochs,
    )  # fmt: skip
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": EPOCHS,
        "logger": TensorBoardLogger(folder, "tensorboard", "", default_hp_metric=False),
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": folder,
        "plugins": [DurableCheckpointIO()],
        "callbacks": [
            Preemption(),
            *callbacks,
            newest,
            Resume(allow),
            DiskSpaceCheck(),
            LoggerResume(),
        ],
    }
    return Trainer(**(defaults | options))


def checkpoint(folder, **options):
    return ModelCheckpoint(dirpath=folder / "checkpoints", enable_version_counter=False, **options)


def loaded_ddpo(pipeline, classifiers, **options):
    """A DDPO whose networks are in memory, so that forked runs need not load them."""
    defaults = {"steps": 2, "baseline": "window", "kind": DDPO}
    module = tiny_ddpo(pipeline, classifiers, **(defaults | options))
    module.configure_model()
    return module


def fit(folder, module, callbacks=(), **options):
    """Train to the end; what a fault interrupts, the same call resumes."""
    data = prompts(8, validation_samples_per_prompt=1)
    callbacks = [
        RewardPlateau(),
        checkpoint(folder, filename="best", monitor="val/apr", mode="max"),
        SampleGrid(every_n_epochs=1, prompts=[PROMPTS[0]], samples_per_prompt=1),
        *callbacks,
    ]
    trainer_of(folder, callbacks, **options).fit(module, datamodule=data)


def fit_on_two(folder, module, **options):
    """The same, as one of two processes."""
    fit(folder, module, devices=2, strategy="ddp", **options)


def last(folder):
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def everything(folder):
    """All that a run has left, but for times, paths and what belongs to its manifests."""
    state = last(folder)
    for part in ("run", "curves"):
        state.pop(part, None)
    for callback in state["callbacks"].values():
        # Lightning saves the one and does not read it; the other says how often it saved
        for bookkeeping in ("current_score", "last_model_path"):
            callback.pop(bookkeeping, None)
    return {
        "checkpoint": _without_paths(state, str(folder)),
        "curves": curves(folder),
        "grids": {p.name: p.read_bytes() for p in sorted(folder.glob("grids/*.png"))},
    }


def curves(folder):
    """Every scalar and every image, in the order of the steps: {tag: [(step, value), ...]}."""
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    scalars = {
        tag: [(e.step, e.value) for e in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if not tag.startswith("time/")
    }
    images = {
        tag: [(e.step, e.encoded_image_string) for e in events.Images(tag)]
        for tag in events.Tags()["images"]
    }
    return scalars | images


def _without_paths(value, folder):
    if isinstance(value, dict):
        return {
            k.replace(folder, "") if isinstance(k, str) else k: _without_paths(v, folder)
            for k, v in value.items()
        }
    if isinstance(value, list | tuple):
        return [_without_paths(v, folder) for v in value]
    return re.sub(re.escape(folder), "", value) if isinstance(value, str) else value


def differing(one, other, where=""):
    """Name the places where two nested structures differ by as much as a bit."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return [] if one.dtype == other.dtype and torch.equal(one, other) else [where]
    if isinstance(one, dict) and isinstance(other, dict):
        missing = [f"{where}/{k} missing" for k in one.keys() ^ other.keys()]
        common = one.keys() & other.keys()
        return missing + [d for k in common for d in differing(one[k], other[k], f"{where}/{k}")]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return [
            d
            for i, (a, b) in enumerate(zip(one, other, strict=True))
            for d in differing(a, b, f"{where}/{i}")
        ]
    return [] if one == other else [f"{where}: {str(one)[:80]} != {str(other)[:80]}"]
