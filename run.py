"""The whole command line: `python run.py fit|validate|test|predict|describe --config NAME.yaml`.

And `python run.py report RUN...` on what those left.
"""

import difflib
import inspect
import pydoc
import re
import sys
import warnings
from pathlib import Path
from typing import Any, Literal, NoReturn

import lightning as L
from jsonargparse import ActionConfigFile, set_parsing_settings
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.cli import (
    ArgsType,
    LightningArgumentParser,
    LightningCLI,
    SaveConfigCallback,
)
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

import callbacks
import datamodules
import lightning_modules
from datamodules.errors import UserError
from datamodules.leaks import require_no_leaks
from fault_tolerance.checkpoint_io import DurableCheckpointIO
from fault_tolerance.curves import Curves
from fault_tolerance.preemption import Preemption
from fault_tolerance.resume import Resume
from fault_tolerance.run_folder import Room, claim
from fault_tolerance.settings import settings_of
from fault_tolerance.watchdog import Watchdog
from metrics.report import report, report_parser, run_folders

CONFIGS = Path(__file__).parent / "configs"

EXPECTED = (
    # frozen networks are in eval mode throughout
    "Found .* in eval mode at the start of training",
    # prompts are a few bytes, and small images are read in the process that trains
    "does not have many workers",
    # scores are gathered before they are logged: every rank logs the same
    "recommended to use `self.log\\('(val|test)/(apr|reward)'",
    # of Lightning's own making, for Lightning to change
    "`isinstance\\(treespec, LeafSpec\\)` is deprecated",
    "torch.distributed.nn.functional.all_gather is deprecated",
)
for message in EXPECTED:
    warnings.filterwarnings("ignore", f".*{message}")

set_parsing_settings(omegaconf_absolute_to_relative_paths=True)


class ConfigFile(ActionConfigFile):
    """Looks for a configuration in the working directory, then among the shipped ones."""

    def __call__(self, parser: Any, config: Any, value: Any, option: str | None = None) -> None:
        """Apply the file named by `value`."""
        if isinstance(value, str) and not Path(value).exists():
            shipped = sorted(str(p.relative_to(CONFIGS)) for p in CONFIGS.rglob("*.yaml"))
            if value not in shipped:
                parser.error(
                    f"there is no configuration {value}, neither here nor among the shipped ones: "
                    + ", ".join(shipped)
                )
            value = str(CONFIGS / value)
        super().__call__(parser, config, value, option)


class Parser(LightningArgumentParser):
    """Answers a mistake with one message, and a misspelt name with the nearest known one."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong and exit with code 2."""
        if not self.exit_on_error:
            super().error(message, ex)
        self.exit(2, f"error: {_misspelt(message) or message}\n")


def _misspelt(message: str) -> str | None:
    """Say which name is unknown and which is near it, if that is what a message is about."""
    if found := re.search(r"class_path '([\w.]+)':\s+Option '(\w+)' is not accepted", message):
        path, name = found.groups()
        parameters = (inspect.signature(c).parameters for c in pydoc.locate(path).__mro__[:-1])
        return _unknown(f"option of {path}", name, {p for names in parameters for p in names})
    if found := re.search(r"Expected a dot import path string: (\w+)", message):
        classes = (
            *lightning_modules.__all__,
            *datamodules.__all__,
            *callbacks.__all__,
        )
        return _unknown("class", found[1], set(classes))
    if found := re.search(r"(?:accept option '|unrecognized arguments: --)([\w.]+)", message):
        trainer = {f"trainer.{name}" for name in inspect.signature(L.Trainer).parameters}
        root, *rest = found[1].split(".")
        near = difflib.get_close_matches(root, ["trainer", "model", "data"], n=1) or [root]
        known = trainer | {".".join([*near, *rest]), "config", "ckpt_path", "seed_everything"}
        return _unknown("option", found[1], known - {found[1]})
    return None


def _unknown(kind: str, name: str, known: set[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {near[0]}?" if near else f" Known are: {', '.join(sorted(known))}"
    return f"there is no {kind} named {name}.{hint}"


class SaveConfig(SaveConfigCallback):
    """Saves the configuration of each subcommand beside the run: `config_fit.yaml`, ..."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write the file on rank 0, replacing that of an earlier run of the same subcommand."""
        self.config_filename = f"config_{trainer.state.fn.value}.yaml"
        super().setup(trainer, pl_module, stage)


class Trainer(L.Trainer):
    """Lightning's trainer; `fit` and `predict` resume by themselves, `describe` is a command."""

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
            ckpt_path: `last` goes on from the run folder's newest whole checkpoint if there is
                one; null starts anew.
        """
        resume = next(c for c in self.callbacks if isinstance(c, Resume))
        ckpt_path = resume.start_from(self, ckpt_path)
        super().fit(model, train_dataloaders, val_dataloaders, datamodule, ckpt_path)

    def predict(
        self,
        model: L.LightningModule | None = None,
        dataloaders: Any = None,
        datamodule: L.LightningDataModule | None = None,
        return_predictions: bool | None = False,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> Any:
        """Draw samples; a SampleFolder callback keeps them.

        Args:
            model: The model to draw from.
            dataloaders: Not used: the data module has them.
            datamodule: The prompts to draw for.
            return_predictions: Keep all of them in memory, as a notebook may want.
            ckpt_path: Not needed: the model's own arguments name its weights.
            weights_only: Load ckpt_path without running code from it.
        """
        return super().predict(
            model, dataloaders, datamodule, return_predictions, ckpt_path, weights_only
        )

    def describe(
        self,
        model: L.LightningModule | None = None,
        datamodule: L.LightningDataModule | None = None,
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
        print(datamodule.describe())
        if leaks != "tables":
            found = datamodule.leaks()
            print(f"\nLeaks between the splits: {len(found):,}")
            for leak in found:
                print(f"  {leak}")
            if leaks == "strict":
                require_no_leaks(found)


class CommandLine(LightningCLI):
    """LightningCLI, with `describe`, and with the configuration winning over a checkpoint's."""

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
        """Add the callbacks that every run has and that have options of their own."""
        parser.add_lightning_class_args(Resume, "resume")
        parser.add_lightning_class_args(Watchdog, "watchdog")

    def __deepcopy__(self, memo: dict[int, Any]) -> "CommandLine":
        """Stay one: the averaged copy of a model knows the command line by its optimizer."""
        return self

    def before_instantiate_classes(self) -> None:
        """Claim the run folder while nothing is built yet."""
        if self.subcommand != "describe" and rank_zero_only.rank == 0:
            root = self._get(self.config, "trainer").default_root_dir or Path.cwd()
            claim(Path(root), self.subcommand)

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Give every run what keeps its work, and a progress bar that moves inside a step."""
        always: list[L.Callback] = [Room(), Curves()]
        if self._get(self.config_init, "trainer").enable_progress_bar is not False:
            always.append(callbacks.InnerProgressBar())
        self.trainer_defaults = {"callbacks": always}
        plugins = self._get(self.config_init, "trainer").plugins or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        trainer = super().instantiate_trainer(plugins=[*plugins, DurableCheckpointIO()], **kwargs)
        precision = str(self._get(self.config_init, "trainer").precision)
        if precision.startswith("16") and isinstance(trainer.accelerator, CPUAccelerator):
            # Lightning would take another one in its place
            raise UserError(
                f"precision {precision} needs a GPU, and this run is on the CPU. Allowed here are "
                "32-true and bf16-mixed: --trainer.precision 32-true"
            )
        # first, so that it leaves before anything of a batch is logged
        trainer.callbacks.insert(0, Preemption())
        resume = next(c for c in trainer.callbacks if isinstance(c, Resume))
        resume.settings = settings_of(self.config[self.subcommand].as_dict())
        return trainer

    def _parse_ckpt_path(self) -> None:
        """Keep the command line's values: Lightning would replace them by the checkpoint's."""


def main(args: ArgsType = None) -> CommandLine | Path:
    """Run the command line; `args` stands in for `sys.argv[1:]`."""
    given = sys.argv[1:] if args is None else args
    if given and given[0] == "report":
        asked = report_parser(prog="run.py report").parse_args(given[1:])
        written = report(run_folders(asked.runs), asked.output)
        rank_zero_info(f"report in {written}")
        return written
    if args is not None:
        warnings.filterwarnings("ignore", "LightningCLI's args parameter is intended")
    return CommandLine(
        L.LightningModule,
        L.LightningDataModule,
        trainer_class=Trainer,
        parser_class=Parser,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        save_config_callback=SaveConfig,
        save_config_kwargs={"overwrite": True},
        seed_everything_default=42,
        parser_kwargs={
            "parser_mode": "omegaconf+",
            "allow_abbrev": False,
            "description": "Fine-tune Stable Diffusion, and align it with its prompts by DDPO.",
            "epilog": "And `run.py report RUN...`: tables and figures of finished runs.",
        },
        args=args,
    )


def user_message(error: UserError) -> str:
    """Cut off the traceback that torch puts before the message of a DataLoader's worker."""
    raised = f"{UserError.__module__}.{UserError.__name__}: "
    return str(error).rpartition(raised)[2].strip()


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"\nerror: {user_message(error)}", file=sys.stderr)
        sys.exit(2)
