"""The data modules, by the names that the command line takes."""

from datamodules.isic import ISICDataModule
from datamodules.prompts import ISICPromptDataModule

__all__ = ["ISICDataModule", "ISICPromptDataModule"]
