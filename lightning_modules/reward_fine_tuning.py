"""What DDPO and DRaFT share: a U-Net trained for a reward, and how it is scored and drawn from."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import UNet2DConditionModel
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from rl4med_ddpo.datamodules.images import to_eight_bits
from rl4med_ddpo.foundation.errors import UserError
from rl4med_ddpo.foundation.hashes import weights_digest
from rl4med_ddpo.foundation.randomness import generator, key, keys
from rl4med_ddpo.lightning_modules.classifier import load_classifier, require_same_attributes
from rl4med_ddpo.lightning_modules.diffusion.lora import add_lora, load_policy, save_lora
from rl4med_ddpo.lightning_modules.networks.frozen import Frozen
from rl4med_ddpo.lightning_modules.pipelines.load import load_pipeline
from rl4med_ddpo.lightning_modules.pipelines.source import is_hub_id
from rl4med_ddpo.lightning_modules.policy_gradient.divergence import divergence_from_start
from rl4med_ddpo.lightning_modules.policy_gradient.non_finite import (
    FOLDER,
    REDRAW_SETTINGS,
    Fault,
    SkippedUpdates,
    write_faults,
)
from rl4med_ddpo.lightning_modules.policy_gradient.scorer import PolicyScorer, require_independent
from rl4med_ddpo.lightning_modules.prerequisites import Prerequisite, require
from rl4med_ddpo.lightning_modules.rewards.base import Reward, Rewards, require_form, scored
from rl4med_ddpo.lightning_modules.samples import Samples, filled_rows
from rl4med_ddpo.lightning_modules.text_to_image import TextToImage
from rl4med_ddpo.lightning_modules.trained_weights import announce


class RewardFineTuning(TextToImage):
    """Trains a pipeline's U-Net so that its images earn more reward; subclasses say how.

    Fixed prompts and noise are drawn and scored in validation, others in `test` and `predict`.
    Subclasses have the hyperparameters `policy`, `judge`, `train`, `lora_rank`, `seed` and
    `compile` besides those of `TextToImage`.

    Args:
        reward: What an image earns.
        optimizer: Makes the optimizer of the trained parameters.
    """

    # narrower than Lightning declares them
    all_gather: Callable[[Tensor], Tensor]
    optimizers: Callable[[], LightningOptimizer]
    configuration: str
    """The shipped configuration that trains with this class."""
    model_name: str
    """What the trained model is called in tables and figures."""

    def __init__(self, reward: Reward, optimizer: OptimizerCallable) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.reward, self.optimizer = reward, optimizer
        self.skipped = SkippedUpdates()
        # digest of the U-Net that training starts from, once an evaluation has loaded it
        self.before_training: str | None = None
        self.scores_are_whole = True
        # the U-Net that training starts from, where a penalty keeps comparing with it
        self.start: Frozen[UNet2DConditionModel] | None = None

    def setup(self, stage: str) -> None:
        """Refuse, before anything is loaded, what cannot work."""
        super().setup(stage)
        require(self.prerequisites(stage))
        fits_what_it_read = stage == "fit" and self.trained_from == self.hparams.policy
        if fits_what_it_read and self.trained_from is not None:
            raise UserError(
                f"policy={self.hparams.policy} was read outside of a trainer, to draw from: it is "
                "not trained further.\n  Let the trainer put the module together, or leave "
                "policy out"
            )

    def prerequisites(self, stage: str) -> list[Prerequisite]:
        """List what earlier stages must have left for this one."""
        found = [
            *self.reward.prerequisites(),
            Prerequisite(self.hparams.judge, "the judge", "rl4med-ddpo fit --config judge.yaml"),
        ]
        if not is_hub_id(self.hparams.pipeline):
            made_by = "rl4med-ddpo fit --config sd.yaml"
            found.append(Prerequisite(self.hparams.pipeline, "the fine-tuned pipeline", made_by))
        if stage != "fit" and self.hparams.policy and not self.awaits_checkpoint:
            made_by = f"rl4med-ddpo fit --config {self.configuration}"
            found.append(Prerequisite(self.hparams.policy, "the trained policy", made_by))
        return found

    def configure_model(self) -> None:
        """Load the pipeline, the reward's networks and the judge."""
        if hasattr(self, "model"):
            return
        super().configure_model()
        with torch.device("cpu"):
            self.reward.load()
            self.scorer = self.make_scorer()
            self.try_reward(torch.device("cpu"))
        if self.hparams.compile:
            self.model.unet.compile(backend=self.hparams.compile)

    def keep_start(self) -> None:
        """Keep the U-Net as it is before training, unless switching adapters off gives it back."""
        fitting = self._trainer and self.trainer.state.fn == TrainerFn.FITTING
        if fitting and self.hparams.train == "full":
            with torch.device("cpu"):
                self.start = Frozen(self.unet_before_training())

    @property
    def attributes(self) -> int:
        """Number of attributes that a prompt may ask for."""
        return len(self.scorer.judge.module.vocabulary.attributes)

    def make_scorer(self) -> PolicyScorer:
        """Load the judge, which must be another network than the reward's."""
        judge = load_classifier(self.hparams.judge, heads="judge")
        readers = {f"the judge {self.hparams.judge}": judge.vocabulary}
        require_independent(judge, self.reward, self.hparams.judge)
        for number, network in enumerate(self.reward.classifiers(), start=1):
            readers[f"network {number} of the reward"] = network.vocabulary
        data = self._trainer and getattr(self.trainer.datamodule, "vocabulary", None)
        if data:
            require_same_attributes(data, readers)
        return PolicyScorer(judge)

    def prepare_unet(self, unet: UNet2DConditionModel) -> None:
        """Make the policy: trainable for `fit` and checkpoints, else the exported one."""
        fitting = self._trainer and self.trainer.state.fn == TrainerFn.FITTING
        self.before_training = None if fitting else weights_digest(unet)
        policy = None if fitting or self.awaits_checkpoint else self.hparams.policy
        if policy:
            load_policy(unet, Path(policy))
            announce(Path(policy))
            self.trained_from = policy
        elif self._trainer and not fitting and not self.awaits_checkpoint:
            # the pipeline as it is
            return
        elif self.hparams.train == "lora":
            add_lora(unet, self.hparams.lora_rank, seed=self.hparams.seed)
        else:
            unet.requires_grad_(True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Optimize the adapters or the full U-Net, whichever is trained."""
        return self.optimizer(self.trained_parameters())

    def on_fit_start(self) -> None:
        """Refuse a reward that leaves the device, before the first rollout."""
        if self.device.type != "cpu":
            self.try_reward(self.device)

    def try_reward(self, device: torch.device) -> None:
        """Refuse a reward that does not return what a reward should."""
        require_form(self.reward, self.model.image_size, self.attributes, device)

    def order(self, batch: dict[str, Any]) -> Tensor:
        """Shuffle the samples of an epoch, `(M,)`: position i is rank i mod W's.

        An update takes a run of positions, so it trains on the same samples for any number of ranks
        W.
        """
        shuffle = generator(key(self.hparams.seed, "order", self.current_epoch))
        return torch.randperm(len(batch["prompt"]), generator=shuffle)

    def reduction(self, last: bool) -> AbstractContextManager[Any]:
        """Reduce the gradients of an update over the ranks once, in the last of its passes."""
        strategy = self.trainer.strategy
        if not last and isinstance(strategy, ParallelStrategy):
            return strategy.block_backward_sync()
        return nullcontext()

    def gather_in_order(self, values: Tensor) -> Tensor:
        """Interleave the ranks' `(n, ...)` into `(M, ...)`: position p is rank p mod W's."""
        ranks = self.all_gather(values).reshape(self.trainer.world_size, *values.shape)
        return ranks.transpose(0, 1).flatten(0, 1)

    @torch.no_grad()
    def gather_rewards(self, mine: Rewards, more: dict[str, Tensor]) -> Tensor:
        """Gather the rewards of all ranks, log what they are made of, and return their sum, `(M,)`.

        Args:
            mine: What this rank's images earned.
            more: Terms that are known of all ranks' samples and still to be added, `(M,)` each.
        """
        rewards = self.gather_in_order(mine.value)
        terms = {name: self.gather_in_order(term) for name, term in mine.terms.items()} | more
        for term in more.values():
            rewards = rewards + term
        for name, part in mine.parts.items():
            self.log(f"reward/{name}", self.gather_in_order(part).mean(), batch_size=1)
        sizes = {name: term.abs().nansum() for name, term in terms.items()}
        whole = sum(sizes.values())
        for name, size in sizes.items():
            self.log(f"reward_share/{name}", size / whole, batch_size=1)
        finite = rewards[rewards.isfinite()]
        self.log("reward/mean", finite.mean(), prog_bar=True, batch_size=1)
        self.log("reward/std", finite.std(correction=0), batch_size=1)
        return rewards

    def log_rewards_of_prompts(self, batch: dict[str, Any], order: Tensor, rewards: Tensor) -> None:
        """Log each prompt's mean reward, of `(M,)` in this order, by its short name."""
        names = [batch["name"][i] for i in order.tolist()]
        for name in sorted(set(names)):
            rows = [row for row, other in enumerate(names) if other == name]
            self.log(f"reward_of_prompt/{name}", rewards[rows].mean(), batch_size=1)

    def log_run(self, samples: int, seconds: float) -> None:
        """Log how far the run has come, and how many samples a second it trains on."""
        run = {
            "trainer/optimizer_steps": float(self.global_step),
            "trainer/skipped_updates": float(self.skipped.total),
            "time/samples_per_second": samples / seconds,
        }
        self.log_dict(run, batch_size=1)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Score this rank's share of the prompts, always with the same noise."""
        mine = slice(self.global_rank, None, self.trainer.world_size)
        prompts, conditions = batch["prompt"][mine], batch["condition"][mine].to(self.device)
        if prompts:
            noise_keys = keys(self.hparams.seed, "validation", 0, batch["index"][mine])
            images = self.generate(prompts, noise_keys)
            reward = self.reward_of(images, conditions)
            self.scorer.count(self.scorer.judge(images), reward, conditions)
        if batch_idx == 0:
            self.scorer.divergence.update(self.divergence_of(batch))

    def divergence_of(self, batch: dict[str, Any]) -> Tensor:
        """KL divergence from the start, `(n,)`, of this rank's among the first images of a batch.

        Which images these are does not depend on the number of ranks.
        """
        mine = slice(self.global_rank, self.hparams.sample_batch, self.trainer.world_size)
        if not batch["prompt"][mine]:
            return torch.zeros(0, device=self.device)
        noise_keys = keys(self.hparams.seed, "validation", 0, batch["index"][mine])
        return divergence_from_start(
            self.model, batch["prompt"][mine], noise_keys, self.unet_before_training
        )

    def unet_before_training(self) -> UNet2DConditionModel:
        """Return the U-Net that training started from: the one that is kept, or read again."""
        if self.start is not None:
            return self.start.module
        return load_pipeline(self.hparams.pipeline, self.hparams.unet).unet

    def on_validation_epoch_end(self) -> None:
        """Log the scores over all processes, and the divergence that they were bought with."""
        self.log("val/apr", self.scorer.apr.compute().rate, prog_bar=True)
        if self.scorer.apr6 is not None:
            self.log("val/apr6", self.scorer.apr6.compute().rate)
        self.log("val/reward", self.scorer.mean_reward.compute())
        self.log("val/sqrt_kl", self.scorer.divergence.compute().sqrt())
        self.scorer.reset()

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> Samples | None:
        """Draw as for prediction, with noise that validation never sees, and count that."""
        # who keeps samples scores all of them, those drawn before too
        self.scores_are_whole = "drawn" not in batch
        drawn = self.predict_step(batch, batch_idx)
        if drawn is not None:
            self.scorer.count(drawn.judge_logits, drawn.reward, drawn.conditions)
        return drawn

    def on_test_epoch_end(self) -> None:
        """Log the scores of what was drawn, unless a folder has more of them."""
        if self.scores_are_whole:
            self.log("test/apr", self.scorer.apr.compute().rate)
            self.log("test/reward", self.scorer.mean_reward.compute())
        self.scorer.reset()

    @torch.no_grad()
    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> Samples | None:
        """Draw a batch of prompts that is this rank's, as far as its samples are not `drawn`.

        A batch is drawn by one rank and whole, even if a single sample is missing, so that no image
        depends on the number of ranks or on what was there.
        """
        if batch_idx % self.trainer.world_size != self.global_rank:
            return None
        n = len(batch["prompt"])
        missing = [row for row, drawn in enumerate(batch.get("drawn", [False] * n)) if not drawn]
        if not missing:
            return None
        return self.samples(batch, "test").select(missing)

    def samples(self, given: dict[str, Any], purpose: Literal["validation", "test"]) -> Samples:
        """Draw and score the images of a batch, the last one repeated until all passes are full.

        Args:
            given: Of prompts.
            purpose: Decides the noise.
        """
        rows = filled_rows(len(given["prompt"]), self.hparams.sample_batch)
        batch: dict[str, Any] = {name: _rows(column, rows) for name, column in given.items()}
        noise_keys = keys(self.hparams.seed, purpose, 0, batch["index"])
        images = to_eight_bits(self.generate(batch["prompt"], noise_keys))
        shown, conditions = images.float() / 255, batch["condition"].to(self.device)
        size = self.hparams.sample_batch
        passes = list(zip(shown.split(size), conditions.split(size), strict=True))
        return Samples(
            prompts=batch["prompt"],
            names=batch["name"],
            conditions=conditions,
            index=batch["index"],
            noise_keys=noise_keys,
            images=images,
            reward=torch.cat([self.reward_of(x, c) for x, c in passes]),
            reward_logits=self.read_by_reward(shown.split(size)),
            judge_logits=torch.cat([self.scorer.judge(x) for x, _ in passes]),
        )

    def read_by_reward(self, batches: Sequence[Tensor]) -> Tensor | None:
        """Return the logits, `(N, A)`, of the reward's first network that reads all attributes."""
        readers = self.reward.classifiers()
        reader = next((r for r in readers if r.attributes == r.vocabulary.attributes), None)
        if reader is None:
            return None
        with torch.autocast(self.device.type, enabled=False):
            return torch.cat([reader(images.float()) for images in batches])

    def reward_of(self, images: Tensor, conditions: Tensor) -> Tensor:
        """Return the reward of images `(B, 3, H, W)` asked to show `(B, A)`, as `(B,)`."""
        return scored(self.reward, images, conditions).value

    def skip(self, own: list[Fault]) -> None:
        """Skip an update on all ranks: write down whose samples are at fault, and count.

        Args:
            own: This rank's.
        """
        ranks: list[list[Fault]] = [own] * self.trainer.world_size
        if self.trainer.world_size > 1:
            torch.distributed.all_gather_object(ranks, own)
        everyone = [fault for faults in ranks for fault in faults]
        name = f"epoch_{self.current_epoch}_{self.skipped.total + 1}.pt"
        file = Path(self.trainer.default_root_dir) / FOLDER / name
        if self.trainer.is_global_zero:
            draw = {name: self.hparams[name] for name in REDRAW_SETTINGS if name in self.hparams}
            draw["epoch"] = self.current_epoch
            write_faults(file, everyone, draw, self.state_dict())
        self.skipped.add(everyone, file, self.hparams.max_skipped)

    def export(self, folder: Path) -> None:
        """Write the policy: its adapters, or the whole pipeline if the full U-Net was trained."""
        if self.hparams.train == "lora":
            save_lora(self.model.unet, folder)
        else:
            super().export(folder)

    def networks(self) -> dict[str, nn.Module]:
        """Name the networks that decide an image and its scores."""
        return super().networks() | {"reward": self.reward, "judge": self.scorer.judge}


def _rows(column: list[Any] | Tensor, rows: list[int]) -> list[Any] | Tensor:
    return column[rows] if isinstance(column, Tensor) else [column[row] for row in rows]
