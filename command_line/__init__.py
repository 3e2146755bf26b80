"""The command line, on LightningCLI."""

from rl4med_ddpo.command_line.cli import CommandLine, Trainer
from rl4med_ddpo.command_line.main import main, run

__all__ = ["CommandLine", "Trainer", "main", "run"]
