"""The data modules, by the names that the command line takes."""

from rl4med_ddpo.datamodules.isic import ISICDataModule
from rl4med_ddpo.datamodules.prompts import ISICPromptDataModule

__all__ = ["ISICDataModule", "ISICPromptDataModule"]
