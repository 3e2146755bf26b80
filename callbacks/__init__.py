"""The callbacks, by the names that the command line takes."""

from rl4med_ddpo.callbacks.evaluation import Evaluation
from rl4med_ddpo.callbacks.export import Export
from rl4med_ddpo.callbacks.predictions import Predictions
from rl4med_ddpo.callbacks.progress import InnerProgressBar
from rl4med_ddpo.callbacks.reward_hacking import RewardHacking
from rl4med_ddpo.callbacks.reward_plateau import RewardPlateau
from rl4med_ddpo.callbacks.sample_folder import SampleFolder
from rl4med_ddpo.callbacks.sample_grid import SampleGrid

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
