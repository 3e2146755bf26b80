"""Watch the policy learn: the same prompts drawn from the same noise, again and again."""

from pathlib import Path

import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image

from rl4med_ddpo.datamodules.vocabulary import DERMOSCOPY, Vocabulary
from rl4med_ddpo.foundation.errors import UserError
from rl4med_ddpo.foundation.randomness import keys
from rl4med_ddpo.foundation.trainer import Trainer, products_folder
from rl4med_ddpo.lightning_modules.text_to_image import TextToImage
from rl4med_ddpo.report.sheet import Panel, in_rows, save_png, sheet


def readable_prompts(vocabulary: Vocabulary) -> list[str]:
    """Choose prompts whose images tell a reader most: few attributes, diseases side by side.

    Without any of `any_of`, with each one, and with two.
    """
    several = vocabulary.any_of
    shown = ((), *((a,) for a in several), several[:3:2])
    return [
        vocabulary.prompt_of(vocabulary.condition_of(one, some))
        for some in shown
        for one in vocabulary.one_of or (None,)
    ]


class SampleGrid(Callback):
    """Draws a captioned grid of samples before training, every few epochs, at the end, in tests.

    Prompts and noise are the same each time, so the grids show what training changes. They go to
    TensorBoard (`samples`) and to `grids/epoch_XXXX.png` in the run folder; a caption says what the
    prompt asks for and, where the module has a reward, what the image earns (r).

    Args:
        every_n_epochs: Epochs between two grids.
        prompts: Some of the data's prompts; null shows each disease without artifacts, with each
            artifact, and with two.
        samples_per_prompt: Images of each prompt.
        seed: Decides the noise.
    """

    def __init__(
        self,
        every_n_epochs: int = 5,
        prompts: list[str] | None = None,
        samples_per_prompt: int = 4,
        seed: int = 0,
    ) -> None:
        if every_n_epochs < 1 or samples_per_prompt < 1:
            raise UserError(
                f"SampleGrid(every_n_epochs={every_n_epochs}, "
                f"samples_per_prompt={samples_per_prompt}): both must be at least 1"
            )
        self.every_n_epochs = every_n_epochs
        self.samples_per_prompt = samples_per_prompt
        self.given = prompts
        self.seed = seed
        self.drawn_epoch: int | None = None

    def setup(self, trainer: Trainer, pl_module: TextToImage, stage: str) -> None:
        """Find the prompts among the data's."""
        self.vocabulary = getattr(trainer.datamodule, "vocabulary", DERMOSCOPY)
        self.prompts = self.given or readable_prompts(self.vocabulary)
        try:
            rows = [self.vocabulary.prompt_id(prompt) for prompt in self.prompts]
        except ValueError as error:
            raise UserError(f"SampleGrid: {error}") from error
        self.conditions = self.vocabulary.conditions[rows]

    def on_train_start(self, trainer: Trainer, pl_module: TextToImage) -> None:
        """Draw what the run starts from."""
        if trainer.current_epoch == 0:
            self._draw(trainer, pl_module, 0)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: TextToImage) -> None:
        """Draw every few epochs."""
        if (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._draw(trainer, pl_module, trainer.current_epoch + 1)

    def on_train_end(self, trainer: Trainer, pl_module: TextToImage) -> None:
        """Draw what the run ends with."""
        self._draw(trainer, pl_module, trainer.current_epoch)

    def on_test_end(self, trainer: Trainer, pl_module: TextToImage) -> None:
        """Draw what was scored, as `grids/test.png`."""
        if trainer.is_global_zero and not trainer.fast_dev_run:
            save_png(self._grid(pl_module), products_folder(trainer) / "grids" / "test.png")

    def _draw(self, trainer: Trainer, pl_module: TextToImage, epoch: int) -> None:
        if not trainer.is_global_zero or trainer.fast_dev_run or self.drawn_epoch == epoch:
            return
        self.drawn_epoch = epoch
        grid = self._grid(pl_module)
        save_png(grid, Path(trainer.default_root_dir) / "grids" / f"epoch_{epoch:04d}.png")
        # the counter that Lightning gives the scalars: calls of training_step
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("samples", np.asarray(grid), step, dataformats="HWC")

    @torch.no_grad()
    def _grid(self, pl_module: TextToImage) -> Image.Image:
        repeats = self.samples_per_prompt
        prompts = [p for p in self.prompts for _ in range(repeats)]
        conditions = self.conditions.repeat_interleave(repeats, dim=0)
        images = pl_module.generate(prompts, keys(self.seed, "grid", 0, torch.arange(len(prompts))))
        captions = [self.vocabulary.caption(condition) for condition in conditions]
        if reward_of := getattr(pl_module, "reward_of", None):
            rewards = reward_of(images, conditions.to(images.device)).tolist()
            captions = [f"{c}  r={r:.2f}" for c, r in zip(captions, rewards, strict=True)]
        panels = [Panel([image], text) for image, text in zip(images, captions, strict=True)]
        return sheet(in_rows(panels, columns=2 * repeats))
