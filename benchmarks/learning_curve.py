"""What a training learns, by images and by processor seconds, measured as it runs."""

import json
import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from rl4med_ddpo.callbacks.frontier import RealImages, draw_and_read, real_images
from rl4med_ddpo.foundation.files import write_whole
from rl4med_ddpo.foundation.trainer import Trainer
from rl4med_ddpo.lightning_modules.reward_fine_tuning import RewardFineTuning
from rl4med_ddpo.metrics.frontier import distance_to_real, frontier_point

FILE = "learning.json"
COLUMNS = (
    *("images", "cpu_s", "apr", "apr_interval", "reward", "diversity_right", "distance", "sqrt_kl"),
    "worst_prompt",
)


class LearningCurve(Callback):
    """Scores the policy in each validation, and counts what was spent on training until then.

    Writes `learning.json` in the run folder. Seconds are the process's, on all of its threads,
    within training steps; evaluation is not among them.

    Args:
        real: Folder in ISIC 2019's layout with the real images to compare with.
        samples_per_prompt: Images of each prompt that are scored.
    """

    def __init__(self, real: str, samples_per_prompt: int = 16) -> None:
        self.real, self.samples_per_prompt = Path(real), samples_per_prompt
        self.found: RealImages | None = None
        self.cpu, self.since = 0.0, 0.0
        self.curve: dict[str, list[Any]] = {name: [] for name in COLUMNS}

    def on_fit_start(self, trainer: Trainer, pl_module: RewardFineTuning) -> None:
        """Read the real images."""
        self.found = real_images(trainer, pl_module, self.real)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the clock."""
        self.since = time.process_time()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Stop it."""
        self.cpu += time.process_time() - self.since

    def on_validation_end(self, trainer: Trainer, pl_module: RewardFineTuning) -> None:
        """Score the policy at the guidance that it is trained at, on noise of the test."""
        data = trainer.datamodule
        loader = data.eval_loader(self.samples_per_prompt, data.predict_batch_size)
        images, reward = draw_and_read(
            trainer, pl_module, loader, "test", pl_module.hparams.guidance
        )
        assert self.found is not None
        distance = distance_to_real(images, self.found.scored.features, self.found.lesions)
        point = frontier_point(images, distance, data.vocabulary.names)
        row = {
            "images": (trainer.current_epoch + 1) * data.samples_per_epoch,
            "cpu_s": self.cpu,
            "apr": point["apr"],
            "apr_interval": point["apr_interval"],
            "reward": reward,
            "diversity_right": point["diversity_right"]["value"],
            "distance": distance["value"],
            "sqrt_kl": trainer.callback_metrics["val/sqrt_kl"].item(),
            "worst_prompt": min(point["prompts"].values()),
        }
        for name, value in row.items():
            self.curve[name].append(value)
        file = Path(trainer.default_root_dir) / FILE
        write_whole(file, json.dumps(self.curve, indent=2) + "\n")

    def state_dict(self) -> dict[str, Any]:
        """Keep what was measured."""
        return {"cpu": self.cpu, "curve": self.curve}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from it."""
        self.cpu, self.curve = state_dict["cpu"], state_dict["curve"]
