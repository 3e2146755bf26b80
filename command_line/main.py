"""The whole command line: `rl4med-ddpo fit|validate|test|predict|describe --config NAME.yaml`.

And `rl4med-ddpo report RUN...` on what those left. `python run.py` is the same.
"""

import logging
import os
import sys
import traceback
import warnings
from pathlib import Path

import lightning as L
from jsonargparse import set_parsing_settings
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from rl4med_ddpo import __version__
from rl4med_ddpo.command_line.cli import CommandLine, SaveConfig, Trainer
from rl4med_ddpo.command_line.parser import Parser
from rl4med_ddpo.fault_tolerance.run_folder import abandon
from rl4med_ddpo.foundation.errors import UserError
from rl4med_ddpo.report.report import report, report_parser, run_folders

EXPECTED = (
    # frozen networks are in eval mode throughout
    "Found .* in eval mode at the start of training",
    # prompts are a few bytes, and small images are read in the process that trains
    "does not have many workers",
    # scores are gathered before they are logged: every rank logs the same
    "recommended to use `self.log\\('(val|test)/",
    # shares that are as even as they can be, and repeats that are not counted
    "Using `DistributedSampler` with the dataloaders",
    # of Lightning's own making, for Lightning to change
    "`isinstance\\(treespec, LeafSpec\\)` is deprecated",
    "torch.distributed.nn.functional.all_gather is deprecated",
)
REMEDIES = {
    MisconfigurationException: "\n  Said by Lightning, of its trainer's options; "
    "--trainer.accelerator auto takes what this machine has",
    ModuleNotFoundError: "\n  Install what is missing, or leave out what asks for it",
}
for message in EXPECTED:
    warnings.filterwarnings("ignore", f".*{message}")
for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
    # an advertisement, in every run
    logging.getLogger(name).addFilter(lambda record: "litlogger" not in record.getMessage())

set_parsing_settings(omegaconf_absolute_to_relative_paths=True)


def main(args: list[str] | None = None) -> CommandLine | Path:
    """Run the command line; `args` replaces `sys.argv[1:]`."""
    given = sys.argv[1:] if args is None else args
    _refuse_former_variable()
    if os.getcwd() not in sys.path:
        # own rewards, callbacks and modules in files beside the run
        sys.path.append(os.getcwd())
    if given and given[0] == "report":
        asked = report_parser(prog="rl4med-ddpo report").parse_args(given[1:])
        written = report(run_folders(asked.runs), asked.output)
        rank_zero_info(f"report in {written}")
        return written
    if args is not None:
        warnings.filterwarnings("ignore", "LightningCLI's args parameter is intended")
    try:
        return _command_line(args)
    except Exception as error:
        abandon()
        # the parser wraps what a constructor raises
        cause = _cause(error, UserError) or _cause(error, (MisconfigurationException, ImportError))
        if cause is None and isinstance(error, ValueError) and _raised_by_lightning(error):
            cause = MisconfigurationException(str(error).strip())
        if cause is None or (cause is error and isinstance(error, UserError)):
            raise
        raise UserError(f"{cause}{REMEDIES.get(type(cause), '')}") from error


def _refuse_former_variable() -> None:
    """Say what replaced the variable that chose the attributes before 0.2."""
    file = os.environ.get("ATTRIBUTES", "")
    if file.endswith((".yaml", ".yml")):
        raise UserError(
            f"the environment variable ATTRIBUTES is {file}, and is not read any more: the "
            "vocabulary is part of the configuration.\n"
            "  Write it under data.init_args.vocabulary of a YAML file, as "
            "configs/chest_xray/vocabulary.yaml does,\n"
            "  add --config FILE to the command, and unset ATTRIBUTES"
        )


def _command_line(args: list[str] | None) -> CommandLine:
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
            "version": __version__,
            "allow_abbrev": False,
            "description": "Fine-tune Stable Diffusion, and align it with its prompts by DDPO.",
            "epilog": "And `rl4med-ddpo report RUN...`: tables and figures of finished runs.",
        },
        args=args,
    )


def _cause(
    error: BaseException | None, kinds: type[Exception] | tuple[type[Exception], ...]
) -> BaseException | None:
    """Find the error of some kinds that another was raised for."""
    while error is not None and not isinstance(error, kinds):
        error = error.__cause__ or error.__context__
    return error


def _raised_by_lightning(error: BaseException) -> bool:
    """Tell whether it is Lightning's code that refused something, not what it calls."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(frames[-1].filename).is_relative_to(Path(L.__file__).parent)


def user_message(error: UserError) -> str:
    """Cut off the traceback that torch puts before the message of a DataLoader's worker."""
    raised = f"{UserError.__module__}.{UserError.__name__}: "
    return str(error).rpartition(raised)[2].strip()


def run() -> None:
    """Run as a program: a mistake of the user's is one message and exit code 2."""
    try:
        main()
    except UserError as error:
        print(f"\nerror: {user_message(error)}", file=sys.stderr)
        sys.exit(2)
