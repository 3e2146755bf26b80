"""Stage 2: align images with their prompts by DDPO (RL4Med-DDPO, Algorithm 1)."""

import math
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor, nn

from rl4med_ddpo.datamodules.attributes import CONDITIONS, short_name
from rl4med_ddpo.lightning_modules.policy_gradient.advantages import (
    Advantages,
    RewardWindow,
    group_advantages,
)
from rl4med_ddpo.lightning_modules.policy_gradient.ddpo_options import clip_pair, require_options
from rl4med_ddpo.lightning_modules.policy_gradient.loss import (
    Means,
    PolicyLoss,
    clipped_policy_loss,
    require_unit_ratio,
)
from rl4med_ddpo.lightning_modules.policy_gradient.rollout import (
    Pairs,
    Rollout,
    chosen_steps,
    plan_passes,
)
from rl4med_ddpo.lightning_modules.rewards.attributes import AttributeMatch
from rl4med_ddpo.lightning_modules.rewards.base import Reward
from rl4med_ddpo.lightning_modules.sampled_policy import SampledPolicy


class DDPO(SampledPolicy):
    """Trains a pipeline's U-Net so that its images earn more reward.

    One epoch is one rollout: M images are drawn from the current policy, scored, and trained on in
    `inner_epochs` rounds of `updates` optimizer steps each.

    Args:
        pipeline: The fine-tuned pipeline to start from: a folder, a .safetensors file or a hub id.
        unet: Folder of a U-Net that replaces the pipeline's; null keeps it.
        policy: Folder of the trained policy: `fit` exports its best one there, `test` and
            `predict` read it. null scores the pipeline as it is (the paper's row "SD").
        judge: Checkpoint of the classifier that scores APR; never the reward's own weights.
        reward: What an image earns. The paper's is the share of attributes read as asked.
        train: Low-rank adapters on the attention layers, or the full U-Net.
        lora_rank: Rank of the adapters, and their alpha.
        optimizer: 3e-4 suits LoRA; the full U-Net wants 1e-5, 3e-4 turns its images black.
        max_grad_norm: The gradient is scaled down to this norm.
        steps: Denoising steps T; sampling, training and evaluation take the same.
        eta: Share of ancestral noise in each step, in (0, 1].
        guidance: Classifier-free guidance scale, in sampling and in training.
        updates: Optimizer steps of an inner epoch, each on its own part of the samples.
        inner_epochs: Rounds over one rollout, the K of Algorithm 1.
        clip_range: The ratio is clipped at 1 +- this, or between 1 - the first and 1 + the second
            of two. It acts on a log-prob averaged over the latent's dimensions: 1e-4 at 4x64x64;
            smaller latents want more, in inverse proportion.
        clip_dimensions: Dimensions of the latents that clip_range is meant for, 16384 at 4x64x64;
            it is then scaled to this pipeline's. null takes it as it is.
        kl_weight: Weight, in the loss, of the divergence from the policy before training. Costs a
            forward pass more, no second copy: wants train: lora.
        baseline: Whose rewards a sample is compared with: its prompt's in this rollout, its
            prompt's in a window of the last 32, or nothing's (Eq. 2 with the raw reward).
        std_floor: Added to the rewards' standard deviation, in units of the reward.
        advantage_clip: Largest absolute advantage.
        diversity_weight: Weight, in the reward, of a sample's mean distance to the others of its
            prompt, in [0, 1] on 8x8 pixels.
        timestep_fraction: Share of each sample's steps that is trained, drawn anew each time.
        timestep_window: First step that is trained, and the first after; 0 is the noisiest. null
            trains all of them.
        guidance_in_training: Whether updates train the guided policy, which is the one that
            samples, or its conditional half at half the cost. The latter is another estimator, and
            wants old_log_probs: training.
        old_log_probs: The ratio's denominator: as sampled, or from a forward pass of its own in the
            updates' batches before the first of them.
        gradient_checkpointing: Keep few activations and compute the others again.
        compile: torch.compile's backend for the U-Net, such as inductor; null leaves it as it is.
        trajectory: Where the rollout's latents are kept: on the device, or in the host's memory.
        sample_batch: Images sampled at a time on each device.
        micro_batch: (sample, step) pairs per forward and backward pass on each device; auto takes
            as many as fit into memory, up to 64.
        max_skipped: Updates in a row that may be skipped because they are NaN or infinite.
        seed: Decides every draw together with the epoch and the sample's global index.
    """

    def __init__(
        self,
        pipeline: str = "runs/sd/pipeline",
        unet: str | None = None,
        policy: str | None = None,
        judge: str = "runs/judge/checkpoints/best.ckpt",
        reward: Reward = AttributeMatch(),  # noqa: B008 - loads nothing until asked to
        train: Literal["lora", "full"] = "lora",
        lora_rank: int = 4,
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=3e-4, weight_decay=1e-4),
        max_grad_norm: float = 1.0,
        steps: int = 50,
        eta: float = 1.0,
        guidance: float = 5.0,
        updates: int = 2,
        inner_epochs: int = 1,
        clip_range: float | tuple[float, float] = 1e-4,
        clip_dimensions: int | None = None,
        kl_weight: float = 0.0,
        baseline: Literal["group", "window", "none"] = "group",
        std_floor: float = 0.05,
        advantage_clip: float = 5.0,
        diversity_weight: float = 0.0,
        timestep_fraction: float = 1.0,
        timestep_window: tuple[int, int] | None = None,
        guidance_in_training: bool = True,
        old_log_probs: Literal["rollout", "training"] = "rollout",
        gradient_checkpointing: bool = False,
        compile: str | None = None,
        trajectory: Literal["device", "host"] = "device",
        sample_batch: int = 8,
        micro_batch: int | Literal["auto"] = 8,
        max_skipped: int = 3,
        seed: int = 42,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["optimizer", "reward"])
        require_options(self.hparams)
        self.automatic_optimization = False
        self.optimizer, self.reward, self.window = optimizer, reward, RewardWindow()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Run one turn of Algorithm 1: sample, score, then K rounds of policy gradient steps."""
        started = time.monotonic()
        order = self.order(len(batch["prompt"]))
        groups = self.groups(batch, order)
        rollout = self.rollout(batch, order)
        rewards = self.rewards(rollout, groups)
        sampled = time.monotonic()
        if self.are_finite(rollout, rewards):
            advantages = self.advantages(rewards, groups)
            rollout = self.rescored(rollout, advantages.values)
            results = [
                self.update(rollout, advantages.values, update, k) for k, update in self.rounds
            ]
            self.log_training(results, advantages)
        self.log_run(len(order), sampled - started, time.monotonic() - started)

    def advantages(self, rewards: Tensor, groups: Tensor) -> Advantages:
        """Compare each sample with its prompt's, `(M,)` in sample order, the same on every rank."""
        for group in groups.unique().tolist():
            name = f"reward_of_prompt/{short_name(CONDITIONS[group])}"
            self.log(name, rewards[groups == group].mean(), batch_size=1)
        if self.hparams.baseline == "none":
            return Advantages(rewards, 0.0)
        windowed = self.hparams.baseline == "window"
        standardise = self.window.advantages if windowed else group_advantages
        return standardise(rewards, groups, self.hparams.std_floor, self.hparams.advantage_clip)

    @torch.no_grad()
    def rescored(self, rollout: Rollout, advantages: Tensor) -> Rollout:
        """With `old_log_probs: training`, score all actions in the batches that will be trained."""
        if self.hparams.old_log_probs == "rollout":
            return rollout
        log_probs, scored = rollout.log_probs.clone(), torch.zeros(rollout.log_probs.shape)
        for k, update in self.rounds:
            for pairs in self.passes(rollout, advantages, update, k):
                if not scored[pairs.row, pairs.step].all():
                    log_probs[pairs.row, pairs.step] = self.policy_loss(rollout, pairs).log_prob
                    scored[pairs.row, pairs.step] = 1
        return replace(rollout, log_probs=log_probs)

    def update(self, rollout: Rollout, advantages: Tensor, update: int, k: int) -> Means:
        """Take one optimizer step on one part of the samples (Algorithm 1, line 6)."""
        passes = self.passes(rollout, advantages, update, k)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        means = self.accumulate(rollout, passes)
        norm = nn.utils.clip_grad_norm_(self.trained_parameters(), self.hparams.max_grad_norm)
        # reduced over the ranks, so all of them agree
        if not norm.isfinite():
            self.skip(self.faults_of(rollout, passes))
            return means
        self.skipped.passed()
        if update == k == 0:
            self.check_ratio(means)
        self.log("policy/grad_norm", norm, batch_size=1)
        optimizer.step()
        return means

    def accumulate(self, rollout: Rollout, passes: list[Pairs]) -> Means:
        """Add up the gradients of an update.

        Every rank runs the same number of passes, and the gradients of all passes are reduced over
        the ranks once, in the last.
        """
        pairs_in_all = len(rollout.index) // self.hparams.updates * self.trained_steps
        means = Means()
        for i, pairs in enumerate(passes, start=1):
            with nullcontext() if i == len(passes) else self.without_reduction():
                result = self.policy_loss(rollout, pairs)
                self.manual_backward(result.loss.sum() / pairs_in_all)
            means.add(result)
            self.report_progress("update", i, len(passes))
        return means

    def passes(self, rollout: Rollout, advantages: Tensor, update: int, k: int) -> list[Pairs]:
        """Plan the passes of an update over this rank's part of its samples."""
        share = len(rollout.index) // self.hparams.updates
        mine = slice(update * share, (update + 1) * share)
        seeds = (self.hparams.seed, self.current_epoch, k)
        steps = chosen_steps(rollout.index[mine], self.window_of_steps, self.trained_steps, seeds)
        by_rank = advantages.cpu().view(-1, self.trainer.world_size)[mine]
        planned = plan_passes(
            by_rank, self.global_rank, steps, self.micro_batch, skip=not self.hparams.kl_weight
        )
        return [pairs._replace(row=pairs.row + mine.start) for pairs in planned]

    def policy_loss(self, rollout: Rollout, pairs: Pairs) -> PolicyLoss:
        """Evaluate Eq. 2 with a clipped ratio on some pairs of the rollout."""
        latents, previous = rollout.transitions(pairs.row, pairs.step)
        text = self.embed([rollout.prompts[row] for row in pairs.row.tolist()])
        step, advantage = pairs.step.to(self.device), pairs.advantage.to(self.device)
        noise = self.trained_noise(latents, step, text)
        log_prob = self.schedule.log_prob(previous, latents, noise, step)
        old_log_prob = rollout.log_probs[pairs.row, pairs.step]
        result = clipped_policy_loss(log_prob, old_log_prob, advantage, self.clip_range)
        if not self.hparams.kl_weight:
            return result
        reference = self.reference_noise(latents, step, text)
        divergence = self.schedule.divergence(latents, noise, reference, step)
        return result.penalised(divergence, self.hparams.kl_weight)

    def check_ratio(self, means: Means) -> None:
        """Log how far the first pass's ratio is from 1; refuse what clipping would eat in any."""
        first, largest = (
            self.all_gather(deviation).max()
            for deviation in (means.first_deviation, means.deviation)
        )
        self.log("policy/ratio_deviation", first, batch_size=1)
        require_unit_ratio(largest.item(), min(self.clip_range), self.trainer.precision)

    def without_reduction(self) -> AbstractContextManager:
        """Accumulate gradients on this rank alone."""
        strategy = self.trainer.strategy
        parallel = isinstance(strategy, ParallelStrategy)
        return strategy.block_backward_sync() if parallel else nullcontext()

    @property
    def rounds(self) -> list[tuple[int, int]]:
        """The inner epoch and the update within it, of each optimizer step on a rollout."""
        p = self.hparams
        return [(k, update) for k in range(p.inner_epochs) for update in range(p.updates)]

    @property
    def window_of_steps(self) -> tuple[int, int]:
        """First step that may be trained, and the first after."""
        return self.hparams.timestep_window or (0, self.hparams.steps)

    @property
    def trained_steps(self) -> int:
        """Steps of each sample that are trained in an inner epoch."""
        first, end = self.window_of_steps
        return max(1, round(self.hparams.timestep_fraction * (end - first)))

    @property
    def clip_range(self) -> tuple[float, float]:
        """How far the ratio may fall below 1 and rise above it, at this pipeline's latents."""
        meant_for, own = self.hparams.clip_dimensions, math.prod(self.latent_shape)
        scale = meant_for / own if meant_for else 1.0
        below, above = clip_pair(self.hparams.clip_range)
        return scale * below, scale * above

    def log_training(self, results: list[Means], advantages: Advantages) -> None:
        """Log the means over all trained pairs of the epoch."""
        for name, value in Means.over(results).items():
            self.log(f"policy/{name}", value, sync_dist=True, batch_size=1)
        self.log("reward/flat_groups", advantages.flat_groups, batch_size=1)

    def log_run(self, samples: int, sampling: float, whole: float) -> None:
        """Log the speed of all ranks together, the rollout's share of it and what was skipped.

        Args:
            samples: Images of the epoch.
            sampling: Seconds of the rollout and its reward.
            whole: Seconds of all.
        """
        self.log("trainer/optimizer_steps", float(self.global_step), batch_size=1)
        self.log("trainer/skipped_updates", float(self.skipped.total), batch_size=1)
        self.log("time/samples_per_second", samples / whole, batch_size=1)
        self.log("time/rollout_share", sampling / whole, batch_size=1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what later rollouts depend on beside weights and optimizer."""
        checkpoint["reward_window"] = self.window.history
        checkpoint["ddpo"] = {
            "micro_batch": self.micro_batch,
            "skipped": self.skipped.state(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on from there."""
        self.window.history = checkpoint["reward_window"]
        # a checkpoint from before updates were skipped has nothing to count on from
        if kept := checkpoint.get("ddpo"):
            self.skipped.load(kept["skipped"])
            if self.hparams.micro_batch == "auto":
                self.micro_batch = kept["micro_batch"]
