"""The callbacks, by the names that the command line takes."""

from callbacks.evaluation import Evaluation
from callbacks.export import Export
from callbacks.predictions import Predictions
from callbacks.progress import InnerProgressBar
from callbacks.reward_hacking import RewardHacking
from callbacks.reward_plateau import RewardPlateau
from callbacks.sample_folder import SampleFolder
from callbacks.sample_grid import SampleGrid

__all__ = [
    "Evaluation",
    "Export",
    "InnerProgressBar",
    "Predictions",
    "RewardHacking",
    "RewardPlateau",
    "SampleFolder",
    "SampleGrid",
]
