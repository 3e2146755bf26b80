"""How a policy is scored: images of fixed prompts and noise, read by judge and reward network."""

from typing import Any

import lightning as L
import torch
from torch import Tensor
from torchmetrics import MeanMetric

from datamodules.attributes import ARTIFACTS, PROMPTS, prompt_id
from lightning_modules.classifier import load_classifier
from lightning_modules.frozen import Frozen
from lightning_modules.randomness import keys
from metrics.apr import ArtifactPrevalenceRate
from metrics.results import alignment_results, write_results


class PolicyEvaluation(L.LightningModule):
    """Validation and test of a generating module that has a `reward` and a `judge` to load.

    The images' noise depends on (seed, purpose, sample index): validation draws the same noise
    every time and test another, the same for every policy, so that scores are paired.
    """

    def load_scorers(self) -> None:
        """Load the reward's networks and the judge."""
        self.reward.load()
        self.judge = Frozen(load_classifier(self.hparams.judge, attributes=ARTIFACTS))
        self.apr = ArtifactPrevalenceRate(len(PROMPTS))
        self.mean_reward = MeanMetric()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.score(batch, "validation")

    def on_validation_epoch_end(self) -> None:
        self.log("val/apr", self.apr.compute().rate, prog_bar=True)
        self.log("val/reward", self.mean_reward.compute())
        self.reset_scores()

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.score(batch, "test")

    def on_test_epoch_end(self) -> None:
        results = alignment_results(self.apr.compute(), self.mean_reward.compute().item())
        self.log("test/apr", results["apr"])
        self.log("test/reward", results["reward"])
        self.reset_scores()
        if self.trainer.is_global_zero:
            write_results(self.trainer.default_root_dir, results)

    @torch.no_grad()
    def score(self, batch: dict[str, Any], purpose: str) -> Tensor:
        """Draw this rank's share of a prompt batch and count what judge and reward make of it."""
        mine = slice(self.global_rank, None, self.trainer.world_size)
        prompts, conditions = batch["prompt"][mine], batch["condition"][mine].to(self.device)
        images = self.generate(prompts, keys(self.hparams.seed, purpose, 0, batch["index"][mine]))
        asked = torch.tensor([prompt_id(p) for p in prompts], device=self.device)
        self.apr.update(self.judge(images), conditions[:, : len(ARTIFACTS)], asked)
        self.mean_reward.update(self.reward(images, conditions).value)
        return images

    def reset_scores(self) -> None:
        self.apr.reset()
        self.mean_reward.reset()

    def reward_of(self, images: Tensor, conditions: Tensor) -> Tensor:
        """Return the reward of images `(B, 3, H, W)` asked to show `(B, 6)`, as `(B,)`."""
        return self.reward(images, conditions).value
