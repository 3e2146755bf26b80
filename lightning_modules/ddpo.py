"""Stage 2: align images with their prompts by DDPO (RL4Med-DDPO, Algorithm 1)."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor, nn

from datamodules.attributes import CONDITIONS, prompt_id, short_name
from datamodules.errors import UserError
from lightning_modules.advantages import Advantages, RewardWindow, group_advantages
from lightning_modules.ddim import Transition
from lightning_modules.policy import Policy
from lightning_modules.policy_gradient import PolicyLoss, clipped_policy_loss, require_unit_ratio
from lightning_modules.randomness import keys
from lightning_modules.rewards import AttributeMatch, Reward
from lightning_modules.rollout import (
    Pairs,
    Rollout,
    chosen_steps,
    plan_passes,
    record,
    require_divisible,
    require_window,
    sample_order,
)


class DDPO(Policy):
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
        clip_range: The ratio is clipped at 1 +- this. It acts on a log-prob averaged over the
            latent's dimensions: 1e-4 at 4x64x64; smaller latents want more, in inverse proportion.
        baseline: Whose rewards a sample is compared with: its prompt's in this rollout, its
            prompt's in a window of the last 32, or nothing's (Eq. 2 with the raw reward).
        std_floor: Added to the rewards' standard deviation, in units of the reward.
        advantage_clip: Largest absolute advantage.
        timestep_fraction: Share of each sample's steps that is trained, drawn anew each time.
        timestep_window: First step that is trained, and the first after; 0 is the noisiest. null
            trains all of them.
        sample_batch: Images sampled at a time on each device.
        micro_batch: (sample, step) pairs per forward and backward pass on each device.
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
        clip_range: float = 1e-4,
        baseline: Literal["group", "window", "none"] = "group",
        std_floor: float = 0.05,
        advantage_clip: float = 5.0,
        timestep_fraction: float = 1.0,
        timestep_window: tuple[int, int] | None = None,
        sample_batch: int = 8,
        micro_batch: int = 8,
        seed: int = 42,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["optimizer", "reward"])
        if not 0 < timestep_fraction <= 1:
            raise UserError(f"timestep_fraction={timestep_fraction}: allowed are (0, 1]")
        require_window(timestep_window, steps)
        self.automatic_optimization = False
        self.optimizer, self.reward, self.window = optimizer, reward, RewardWindow()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Run one turn of Algorithm 1: sample, score, then K rounds of policy gradient steps."""
        started = time.monotonic()
        order = self.order(len(batch["prompt"]))
        rollout = self.rollout(batch, order)
        rewards = self.rewards(rollout)
        advantages = self.advantages(rewards, batch, order)
        sampled = time.monotonic()
        results = [
            self.update(rollout, advantages.values, update, k)
            for k in range(self.hparams.inner_epochs)
            for update in range(self.hparams.updates)
        ]
        self.log_training(results, advantages)
        self.log_times(len(order), sampled - started, time.monotonic() - started)

    def order(self, samples: int) -> Tensor:
        """Order the epoch's global sample indices; position p is rank p mod W's."""
        require_divisible(samples, self.hparams.updates, self.trainer.world_size)
        return sample_order(samples, self.hparams.seed, self.current_epoch)

    @torch.no_grad()
    def rollout(self, batch: dict[str, Any], order: Tensor) -> Rollout:
        """Draw this rank's samples with their intermediate states (Algorithm 1, line 4)."""
        mine = order[self.global_rank :: self.trainer.world_size]
        prompts = [batch["prompt"][i] for i in mine.tolist()]
        noise_keys = keys(self.hparams.seed, "rollout", self.current_epoch, batch["index"][mine])
        steps, total = len(self.schedule), len(mine) * len(self.schedule)
        trajectories, images = [], []
        for first in range(0, len(mine), self.hparams.sample_batch):
            part = slice(first, first + self.hparams.sample_batch)
            latents, transitions = self.walk(prompts[part], noise_keys[part])
            trajectory = record(latents, self.reported(transitions, first * steps, total))
            trajectories.append(trajectory)
            images.append(self.decode(trajectory.latents[:, -1]))
        latents, log_probs = map(torch.cat, zip(*trajectories, strict=True))
        return Rollout(
            index=batch["index"][mine],
            prompts=prompts,
            conditions=batch["condition"][mine].to(self.device),
            latents=latents,
            log_probs=log_probs,
            images=torch.cat(images),
        )

    def reported(
        self, transitions: Iterator[Transition], done: int, total: int
    ) -> Iterator[Transition]:
        """Pass a batch's transitions on, telling after each how far the whole rollout is."""
        for transition in transitions:
            done += len(transition.log_prob)
            self.report_progress("rollout", done, total)
            yield transition

    @torch.no_grad()
    def rewards(self, rollout: Rollout) -> Tensor:
        """Score the images (Algorithm 1, line 5) and gather all ranks', `(M,)` in sample order."""
        mine = self.reward(rollout.images, rollout.conditions)
        self.report_progress("reward", 1, 1)
        rewards = self.gather_in_order(mine.value)
        self.log("reward/mean", rewards.mean(), prog_bar=True, batch_size=1)
        self.log("reward/std", rewards.std(correction=0), batch_size=1)
        for name, part in mine.parts.items():
            self.log(f"reward/{name}", self.gather_in_order(part).mean(), batch_size=1)
        return rewards

    def gather_in_order(self, values: Tensor) -> Tensor:
        """Interleave the ranks' `(n,)` into `(M,)`: position p is rank p mod W's."""
        return self.all_gather(values).reshape(self.trainer.world_size, -1).T.reshape(-1)

    def advantages(self, rewards: Tensor, batch: dict[str, Any], order: Tensor) -> Advantages:
        """Compare each sample with its prompt's, `(M,)` in sample order, the same on every rank."""
        ids = [prompt_id(batch["prompt"][i]) for i in order.tolist()]
        groups = torch.tensor(ids, device=rewards.device)
        for group in sorted(set(ids)):
            name = f"reward_of_prompt/{short_name(CONDITIONS[group])}"
            self.log(name, rewards[groups == group].mean(), batch_size=1)
        if self.hparams.baseline == "none":
            return Advantages(rewards, 0.0)
        windowed = self.hparams.baseline == "window"
        standardise = self.window.advantages if windowed else group_advantages
        return standardise(rewards, groups, self.hparams.std_floor, self.hparams.advantage_clip)

    def update(self, rollout: Rollout, advantages: Tensor, update: int, k: int) -> PolicyLoss:
        """Take one optimizer step on one part of the samples (Algorithm 1, line 6).

        Every rank runs the same number of passes, and the gradients of all passes are reduced over
        the ranks once, in the last.
        """
        passes = self.passes(rollout, advantages, update, k)
        pairs_in_all = len(rollout.index) // self.hparams.updates * self.trained_steps
        optimizer = self.optimizers()
        optimizer.zero_grad()
        results = []
        for i, pairs in enumerate(passes, start=1):
            with nullcontext() if i == len(passes) else self.without_reduction():
                result = self.policy_loss(rollout, pairs)
                self.manual_backward(result.loss.sum() / pairs_in_all)
            results.append(result)
            self.report_progress("update", i, len(passes))
        if update == k == 0:
            self.check_ratio(results[0])
        norm = nn.utils.clip_grad_norm_(self.trained_parameters(), self.hparams.max_grad_norm)
        self.log("policy/grad_norm", norm, batch_size=1)
        optimizer.step()
        return PolicyLoss(*map(torch.cat, zip(*results, strict=True)))

    def passes(self, rollout: Rollout, advantages: Tensor, update: int, k: int) -> list[Pairs]:
        """Plan the passes of an update over this rank's part of its samples."""
        share = len(rollout.index) // self.hparams.updates
        mine = slice(update * share, (update + 1) * share)
        steps = chosen_steps(
            rollout.index[mine],
            self.window_of_steps,
            self.trained_steps,
            (self.hparams.seed, self.current_epoch, k),
        )
        by_rank = advantages.cpu().view(-1, self.trainer.world_size)[mine]
        planned = plan_passes(by_rank, self.global_rank, steps, self.hparams.micro_batch)
        return [
            Pairs(*(c.to(self.device) for c in (p.row + mine.start, p.step, p.advantage)))
            for p in planned
        ]

    def policy_loss(self, rollout: Rollout, pairs: Pairs) -> PolicyLoss:
        """Evaluate Eq. 2 with a clipped ratio on some pairs of the rollout."""
        latents = rollout.latents[pairs.row, pairs.step]
        text = self.embed([rollout.prompts[row] for row in pairs.row.tolist()])
        noise = self.guided_noise(latents, pairs.step, text, self.embed([""])[0])
        previous = rollout.latents[pairs.row, pairs.step + 1]
        log_prob = self.schedule.log_prob(previous, latents, noise, pairs.step)
        old_log_prob = rollout.log_probs[pairs.row, pairs.step]
        return clipped_policy_loss(log_prob, old_log_prob, pairs.advantage, self.hparams.clip_range)

    def check_ratio(self, first: PolicyLoss) -> None:
        """Log how far the ratio is from 1 before any update, and refuse what clipping would eat."""
        deviation = self.all_gather((first.ratio - 1).abs().max()).max()
        self.log("policy/ratio_deviation", deviation, batch_size=1)
        require_unit_ratio(deviation.item(), self.hparams.clip_range, self.trainer.precision)

    def without_reduction(self) -> AbstractContextManager:
        """Accumulate gradients on this rank alone."""
        strategy = self.trainer.strategy
        parallel = isinstance(strategy, ParallelStrategy)
        return strategy.block_backward_sync() if parallel else nullcontext()

    @property
    def window_of_steps(self) -> tuple[int, int]:
        """First step that may be trained, and the first after."""
        return self.hparams.timestep_window or (0, self.hparams.steps)

    @property
    def trained_steps(self) -> int:
        """Steps of each sample that are trained in an inner epoch."""
        first, end = self.window_of_steps
        return max(1, round(self.hparams.timestep_fraction * (end - first)))

    def log_training(self, results: list[PolicyLoss], advantages: Advantages) -> None:
        """Log the means over all trained pairs of the epoch."""
        loss, _, clipped, kl = map(torch.cat, zip(*results, strict=True))
        for name, values in (("loss", loss), ("clip_fraction", clipped), ("approximate_kl", kl)):
            self.log(f"policy/{name}", values.float().mean(), sync_dist=True, batch_size=1)
        self.log("reward/flat_groups", advantages.flat_groups, batch_size=1)
        self.log("trainer/optimizer_steps", float(self.global_step), batch_size=1)

    def log_times(self, samples: int, sampling: float, whole: float) -> None:
        """Log the speed of all ranks together and the rollout's share of it; times in seconds."""
        self.log("time/samples_per_second", samples / whole, batch_size=1)
        self.log("time/rollout_share", sampling / whole, batch_size=1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the rewards of past rollouts, which `baseline: window` compares with."""
        checkpoint["reward_window"] = self.window.history

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the rewards of past rollouts."""
        self.window.history = checkpoint["reward_window"]
