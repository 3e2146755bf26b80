"""How a policy is scored: images of fixed prompts and noise, read by judge and reward network."""

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from rl4med_ddpo.datamodules.attributes import ARTIFACTS, PROMPTS, prompt_id
from rl4med_ddpo.datamodules.images import to_eight_bits
from rl4med_ddpo.foundation.errors import UserError
from rl4med_ddpo.foundation.randomness import keys
from rl4med_ddpo.lightning_modules.classifier import load_classifier
from rl4med_ddpo.lightning_modules.networks.frozen import Frozen
from rl4med_ddpo.lightning_modules.samples import Samples, draw_anew, filled_rows
from rl4med_ddpo.metrics.apr import ArtifactPrevalenceRate


def shared_weights(one: nn.Module, other: nn.Module) -> float:
    """Return the share of the smaller network's weights that the other has too, bit for bit."""
    mine, its = ({n: p.detach().cpu() for n, p in net.named_parameters()} for net in (one, other))
    same = sum(p.numel() for n, p in mine.items() if n in its and torch.equal(p, its[n]))
    return same / min(sum(p.numel() for p in net.values()) for net in (mine, its))


class PolicyEvaluation(L.LightningModule):
    """Validation and test of a generating module that has a `reward` and a `judge` to load.

    The images' noise depends on (seed, purpose, sample index): validation draws the same noise
    every time and test another, the same for every policy, so that scores are paired. Prediction
    and test draw the same images; the SampleFolder callback keeps them, and Evaluation scores those
    it keeps.
    """

    is_drawn: Callable[[str, int], bool] = staticmethod(draw_anew)

    def load_scorers(self) -> None:
        """Load the reward's networks and the judge."""
        self.reward.load()
        self.judge = Frozen(load_classifier(self.hparams.judge, attributes=ARTIFACTS))
        self.require_independent_judge()
        self.apr = ArtifactPrevalenceRate(len(PROMPTS))
        self.mean_reward = MeanMetric()

    def require_independent_judge(self) -> None:
        """Refuse to have a policy judged by the network that it learned to please."""
        rewarding = getattr(self.reward, "network", None)
        shared = shared_weights(rewarding.module, self.judge.module) if rewarding else 0.0
        if shared > 0.5:
            raise UserError(
                f"the judge {self.hparams.judge} has {shared:.0%} of its weights from the reward "
                "network: its APR would rise with the reward whatever the images show.\n"
                "  Train one of its own: python run.py fit --config judge.yaml"
            )

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Count one batch of prompts, always with the same noise."""
        self.score(batch, "validation")

    def on_validation_epoch_end(self) -> None:
        """Log the scores over all prompts and processes."""
        self.log("val/apr", self.apr.compute().rate, prog_bar=True)
        self.log("val/reward", self.mean_reward.compute())
        self.reset_scores()

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> Samples | None:
        """Draw as for prediction, with noise that validation never sees, and count that."""
        drawn = self.predict_step(batch, batch_idx)
        if drawn is not None:
            wanted = drawn.conditions[:, : len(ARTIFACTS)]
            asked = torch.tensor([prompt_id(p) for p in drawn.prompts], device=self.device)
            self.apr.update(drawn.judge_logits, wanted, asked)
            self.mean_reward.update(drawn.reward)
        return drawn

    def on_test_epoch_end(self) -> None:
        """Log the scores of what was drawn, unless a folder has more of them."""
        if self.is_drawn is draw_anew:
            self.log("test/apr", self.apr.compute().rate)
            self.log("test/reward", self.mean_reward.compute())
        self.reset_scores()

    @torch.no_grad()
    def score(self, batch: dict[str, Any], purpose: str) -> None:
        """Draw this rank's share of a prompt batch and count what judge and reward make of it."""
        mine = slice(self.global_rank, None, self.trainer.world_size)
        prompts, conditions = batch["prompt"][mine], batch["condition"][mine].to(self.device)
        images = self.generate(prompts, keys(self.hparams.seed, purpose, 0, batch["index"][mine]))
        asked = torch.tensor([prompt_id(p) for p in prompts], device=self.device)
        self.apr.update(self.judge(images), conditions[:, : len(ARTIFACTS)], asked)
        self.mean_reward.update(self.reward(images, conditions).value)

    @torch.no_grad()
    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> Samples | None:
        """Draw a batch of prompts that is this rank's, as far as its samples are not there yet.

        A batch is drawn by one rank and whole, even if a single sample is missing, so that no image
        depends on the number of ranks or on what was there.
        """
        if batch_idx % self.trainer.world_size != self.global_rank:
            return None
        asked = zip(batch["prompt"], batch["index"].tolist(), strict=True)
        missing = [row for row, (text, index) in enumerate(asked) if not self.is_drawn(text, index)]
        if not missing:
            return None
        rows = filled_rows(len(batch["prompt"]), self.hparams.sample_batch)
        prompts = [batch["prompt"][row] for row in rows]
        return self.samples(prompts, batch["condition"][rows], batch["index"][rows]).select(missing)

    def samples(self, prompts: list[str], conditions: Tensor, index: Tensor) -> Samples:
        """Draw and score images for B prompts, conditions `(B, 6)` and sample indices `(B,)`."""
        noise_keys = keys(self.hparams.seed, "test", 0, index)
        images = to_eight_bits(self.generate(prompts, noise_keys))
        shown, conditions = images.float() / 255, conditions.to(self.device)
        size, reader = self.hparams.sample_batch, getattr(self.reward, "network", None)
        passes = list(zip(shown.split(size), conditions.split(size), strict=True))
        return Samples(
            prompts=prompts,
            conditions=conditions,
            index=index,
            noise_keys=noise_keys,
            images=images,
            reward=torch.cat([self.reward(x, c).value for x, c in passes]),
            reward_logits=torch.cat([reader(x) for x, _ in passes]) if reader else None,
            judge_logits=torch.cat([self.judge(x) for x, _ in passes]),
        )

    def reset_scores(self) -> None:
        """Start counting anew."""
        self.apr.reset()
        self.mean_reward.reset()

    def reward_of(self, images: Tensor, conditions: Tensor) -> Tensor:
        """Return the reward of images `(B, 3, H, W)` asked to show `(B, 6)`, as `(B,)`."""
        return self.reward(images, conditions).value
