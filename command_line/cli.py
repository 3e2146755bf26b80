"""The commands `fit`, `validate`, `test`, `predict` and `describe`, by LightningCLI."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import lightning as L
from jsonargparse import ActionConfigFile, Namespace
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from lightning.pytorch.callbacks.timer import Interval
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.utilities import rank_zero_info

from rl4med_ddpo import callbacks
from rl4med_ddpo.callbacks.frontier import Frontier
from rl4med_ddpo.callbacks.preflight import Preflight
from rl4med_ddpo.command_line.parser import ConfigFile
from rl4med_ddpo.command_line.trainer_options import (
    require_results,
    require_support,
    require_training,
)
from rl4med_ddpo.datamodules.isic import ISICDataModule
from rl4med_ddpo.fault_tolerance.checkpoint_io import DurableCheckpointIO
from rl4med_ddpo.fault_tolerance.ending import at_epoch_end
from rl4med_ddpo.fault_tolerance.launch import first_rank
from rl4med_ddpo.fault_tolerance.logger_resume import LoggerResume, reopen
from rl4med_ddpo.fault_tolerance.preemption import Preemption
from rl4med_ddpo.fault_tolerance.resume import Resume
from rl4med_ddpo.fault_tolerance.run_folder import DiskSpaceCheck, claim
from rl4med_ddpo.fault_tolerance.settings import callback_settings, settings_of
from rl4med_ddpo.fault_tolerance.watchdog import Watchdog
from rl4med_ddpo.foundation.errors import UserError
from rl4med_ddpo.foundation.trainer import products_folder, trial
from rl4med_ddpo.lightning_modules.prerequisites import require
from rl4med_ddpo.lightning_modules.reward_fine_tuning import RewardFineTuning
from rl4med_ddpo.lightning_modules.text_to_image import TextToImage
from rl4med_ddpo.lightning_modules.trained_weights import scored_checkpoint, weights_that_fit
from rl4med_ddpo.metrics.split_leaks import find_leaks, require_no_leaks

DEFAULTS = {
    "trainer.default_root_dir": ".",
    "trainer.logger": {
        "class_path": "TensorBoardLogger",
        "init_args": {
            "save_dir": "${...default_root_dir}",
            "name": "tensorboard",
            "version": "",
            "default_hp_metric": False,
        },
    },
    "newest_checkpoint.dirpath": "${..trainer.default_root_dir}/checkpoints",
    "newest_checkpoint.filename": "newest",
    "newest_checkpoint.save_last": "link",
    "newest_checkpoint.save_on_train_epoch_end": True,
    "newest_checkpoint.enable_version_counter": False,
}
"""What every run writes unless told otherwise: curves, and its newest state to resume from."""


class SaveConfig(SaveConfigCallback):
    """Saves the configuration of each subcommand in the run folder: `config_fit.yaml`, ..."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write the file on rank 0, replacing that of an earlier run of the same subcommand."""
        assert trainer.state.fn is not None
        if why := trial(trainer):
            rank_zero_info(
                f"a trial run ({why}): what the run folder holds is left alone; results, if any, "
                f"are in {products_folder(trainer)}"
            )
            return
        self.config_filename = f"config_{trainer.state.fn.value}.yaml"
        super().setup(trainer, pl_module, stage)


class Trainer(L.Trainer):
    """Lightning's trainer: `fit` resumes, the others score what was trained, `describe` is new."""

    callbacks: list[L.Callback]

    def fit(
        self,
        model: L.LightningModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: L.LightningDataModule | None = None,
        ckpt_path: str | None = "last",
    ) -> None:
        """Train.

        Args:
            model: The model to train.
            train_dataloaders: Not used: the data module has them.
            val_dataloaders: Not used: the data module has them.
            datamodule: The data to train on.
            ckpt_path: `last` resumes from the run folder's newest whole checkpoint if there is
                one; null starts from scratch.
        """
        require_training(self, model)
        _require_prerequisites(model, "fit")
        resume = next(c for c in self.callbacks if isinstance(c, Resume))
        if trial(self):
            # Lightning would still write last.ckpt
            self.callbacks = [c for c in self.callbacks if not isinstance(c, ModelCheckpoint)]
            ckpt_path = None if ckpt_path == "last" else ckpt_path
        ckpt_path = resume.start_from(self, model, datamodule, ckpt_path)
        with weights_that_fit(model, ckpt_path):
            super().fit(model, train_dataloaders, val_dataloaders, datamodule, ckpt_path)

    def _run_stage(self) -> Any:
        if self.fit_loop.restarting and at_epoch_end(self):
            _Loop.restarting.__set__(self.fit_loop, False)
        return super()._run_stage()

    def validate(
        self,
        model: L.LightningModule | None = None,
        dataloaders: Any = None,
        ckpt_path: str | None = "trained",
        verbose: bool = True,
        datamodule: L.LightningDataModule | None = None,
        weights_only: bool | None = None,
    ) -> Any:
        """Score the validation data.

        Args:
            model: The model to score.
            dataloaders: Not used: the data module has them.
            ckpt_path: Whose weights: `trained` takes model.policy where there is that option, else
                the run folder's best checkpoint, else its newest. `best`, `last` or a file; null
                takes the model as its own arguments name it.
            verbose: Print the scores.
            datamodule: The data.
            weights_only: Load ckpt_path without running code from it.
        """
        with self._scored(model, ckpt_path, "validate") as path:
            return super().validate(model, dataloaders, path, verbose, datamodule, weights_only)

    def test(
        self,
        model: L.LightningModule | None = None,
        dataloaders: Any = None,
        ckpt_path: str | None = "trained",
        verbose: bool = True,
        datamodule: L.LightningDataModule | None = None,
        weights_only: bool | None = None,
    ) -> Any:
        """Score the test data.

        Args:
            model: The model to score.
            dataloaders: Not used: the data module has them.
            ckpt_path: Whose weights: `trained` takes model.policy where there is that option, else
                the run folder's best checkpoint, else its newest. `best`, `last` or a file; null
                takes the model as its own arguments name it.
            verbose: Print the scores.
            datamodule: The data.
            weights_only: Load ckpt_path without running code from it.
        """
        with self._scored(model, ckpt_path, "test") as path:
            return super().test(model, dataloaders, path, verbose, datamodule, weights_only)

    def predict(
        self,
        model: L.LightningModule | None = None,
        dataloaders: Any = None,
        datamodule: L.LightningDataModule | None = None,
        return_predictions: bool | None = False,
        ckpt_path: str | None = "trained",
        weights_only: bool | None = None,
    ) -> Any:
        """Draw samples; a SampleFolder callback keeps them.

        Args:
            model: The model to draw from.
            dataloaders: Not used: the data module has them.
            datamodule: The prompts to draw for.
            return_predictions: Keep all of them in memory, as a notebook may want.
            ckpt_path: Whose weights: `trained` takes model.policy where there is that option, else
                the run folder's best checkpoint, else its newest. `best`, `last` or a file; null
                takes the model as its own arguments name it.
            weights_only: Load ckpt_path without running code from it.
        """
        with self._scored(model, ckpt_path, "predict") as path:
            return super().predict(
                model, dataloaders, datamodule, return_predictions, path, weights_only
            )

    @contextmanager
    def _scored(
        self, model: L.LightningModule | None, ckpt_path: str | None, command: str
    ) -> Iterator[str | None]:
        """Choose the checkpoint of an evaluation, and let the model know that one will come."""
        if model is None:
            yield ckpt_path
            return
        path = scored_checkpoint(self, model, ckpt_path)
        if isinstance(model, TextToImage):
            model.awaits_checkpoint = path is not None
        _require_prerequisites(model, command)
        with weights_that_fit(model, path):
            yield path

    def describe(
        self,
        model: L.LightningModule | None = None,
        datamodule: ISICDataModule | None = None,
        leaks: Literal["tables", "report", "strict"] = "tables",
    ) -> None:
        """Print what the tables hold: splits, subgroups, lesions. Needs no images.

        Args:
            model: Not used.
            datamodule: The data to describe.
            leaks: `tables` counts the lesions that two splits share. `report` reads the images and
                lists each pair: of one lesion, of near-duplicates under other ids, and generated
                images among the held-out ones. `strict` ends with an error if there are any.
        """
        assert datamodule is not None
        print(datamodule.describe())
        if leaks != "tables":
            splits = datamodule.splits
            paths = {name: datamodule.paths(rows) for name, rows in splits._asdict().items()}
            found = find_leaks(splits, paths)
            print(f"\nLeaks between the splits: {len(found):,}")
            for leak in found:
                print(f"  {leak}")
            if leaks == "strict":
                require_no_leaks(found)


def _require_prerequisites(model: L.LightningModule, command: str) -> None:
    """Say once what is missing, before other processes are started or anything is written."""
    if isinstance(model, RewardFineTuning):
        require(model.prerequisites(command))


class CommandLine(LightningCLI):
    """LightningCLI, with `describe`, and with the configuration winning over a checkpoint's."""

    subcommand: str

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Build the options of the command that is asked for; of all of them where none is."""
        words = sys.argv[1:] if kwargs.get("args") is None else kwargs["args"]
        every = self.subcommands()
        asked = {name: skip for name, skip in every.items() if words[:1] == [name]}
        self.subcommands = lambda: asked or every
        super().__init__(*args, **kwargs)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Name the trainer's methods that are commands, with the arguments that are not options."""
        commands = LightningCLI.subcommands()
        return commands | {"describe": {"model", "datamodule"}}

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Return a parser whose `--config` also finds the shipped configurations."""
        parser = super().init_parser(**kwargs)
        for action in parser._actions:
            if isinstance(action, ActionConfigFile):
                action.__class__ = ConfigFile
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what every run has and what has options of its own: callbacks and the logger."""
        parser.add_lightning_class_args(Resume, "resume")
        parser.add_lightning_class_args(Watchdog, "watchdog")
        parser.add_lightning_class_args(DiskSpaceCheck, "run_folder")
        parser.add_lightning_class_args(ModelCheckpoint, "newest_checkpoint")
        parser.add_lightning_class_args(Frontier, "frontier")
        parser.set_defaults(DEFAULTS)
        # what the data's conditions mean; models that do not ask for it are left alone
        parser.link_arguments("data.init_args.vocabulary", "model.init_args.vocabulary")

    def __deepcopy__(self, memo: dict[int, Any]) -> "CommandLine":
        """Stay one: the averaged copy of a model knows the command line by its optimizer."""
        return self

    def before_instantiate_classes(self) -> None:
        """Expand `~` in all paths, and claim the run folder while nothing is built yet."""
        options = self.config[self.subcommand]
        for name, value in list(options.items()):
            options[name] = _expanded(value)
        if self.subcommand != "describe" and first_rank() == 0:
            root = self._get(self.config, "trainer").default_root_dir
            if root is None:
                raise UserError(
                    "trainer.default_root_dir is null: name a folder for checkpoints and curves; "
                    "--trainer.default_root_dir . is the working directory"
                )
            unprotected = self._get(self.config, "run_folder").unprotected
            claim(Path(root), self.subcommand, unprotected)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Give every run what keeps its work, and a progress bar that moves inside a step."""
        options = self._get(self.config_init, "trainer")
        require_results(options)
        always: list[L.Callback] = [LoggerResume(), Preflight()]
        if options.enable_progress_bar is not False:
            always.append(callbacks.InnerProgressBar())
        self.trainer_defaults = {"callbacks": always}
        plugins = options.plugins or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        trainer = super().instantiate_trainer(plugins=[*plugins, DurableCheckpointIO()], **kwargs)
        assert isinstance(trainer, Trainer)
        require_support(trainer, options)
        for timer in (c for c in trainer.callbacks if isinstance(c, Timer)):
            if timer._interval == Interval.step:
                rank_zero_info("max_time is checked after each epoch: so a resume is exact")
                timer._interval = Interval.epoch
        # first, so that it leaves before anything of a batch is logged
        trainer.callbacks.insert(0, Preemption())
        resume = next(c for c in trainer.callbacks if isinstance(c, Resume))
        config = self.config[self.subcommand].as_dict()
        resume.settings, resume.callback_settings = settings_of(config), callback_settings(config)
        if self.subcommand != "fit":
            reopen(trainer, [], resumes=False)
        return trainer

    def _instantiate_trainer(
        self, config: dict[str, Any], callbacks: list[L.Callback]
    ) -> L.Trainer:
        """Leave out the newest checkpoint where the run has its own, and all if none is wanted."""
        own = config["callbacks"] or []
        own = own if isinstance(own, list) else [own]
        without = config["enable_checkpointing"] is False
        if without or any(isinstance(c, ModelCheckpoint) and c.monitor is None for c in own):
            callbacks = [c for c in callbacks if not isinstance(c, ModelCheckpoint)]
        if without:
            config["callbacks"] = [c for c in own if not isinstance(c, ModelCheckpoint)]
        return super()._instantiate_trainer(config, callbacks)

    def _parse_ckpt_path(self) -> None:
        """Keep the command line's values: Lightning would replace them by the checkpoint's."""


def _expanded(value: Any) -> Any:
    """Put the home folder in place of `~` where a text begins with it, in nested options too."""
    if isinstance(value, str):
        return os.path.expanduser(value) if value == "~" or value.startswith("~/") else value
    if isinstance(value, dict | Namespace):
        for name, inner in list(value.items()):
            value[name] = _expanded(inner)
    return [_expanded(inner) for inner in value] if isinstance(value, list) else value
