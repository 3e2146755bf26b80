"""Stage 2: align images with their prompts by DDPO (RL4Med-DDPO, Algorithm 1)."""

import math
import time
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from rl4med_ddpo.foundation.progress import progress
from rl4med_ddpo.lightning_modules.diffusion.latent_diffusion import DDIMSchedule
from rl4med_ddpo.lightning_modules.policy_gradient.epoch import Epoch
from rl4med_ddpo.lightning_modules.policy_gradient.idle_rollouts import IdleRollouts
from rl4med_ddpo.lightning_modules.policy_gradient.micro_batch import (
    free_memory,
    largest_micro_batch,
)
from rl4med_ddpo.lightning_modules.policy_gradient.non_finite import (
    faults_of_rollout,
    faults_of_update,
)
from rl4med_ddpo.lightning_modules.policy_gradient.objective import (
    PolicyLoss,
    PolicyObjective,
    RewardWindow,
    equal_weights,
    group_advantages,
    raw_advantages,
    require_no_divergence,
    require_unit_ratio,
)
from rl4med_ddpo.lightning_modules.policy_gradient.options import (
    clip_pair,
    require_groups,
    require_options,
    require_unscaled_gradients,
)
from rl4med_ddpo.lightning_modules.policy_gradient.rollout import (
    Pairs,
    Rollout,
    RolloutSampler,
    blank_pairs,
    blank_rollout,
    chosen_steps,
    plan_passes,
    require_divisible,
)
from rl4med_ddpo.lightning_modules.reward_fine_tuning import RewardFineTuning
from rl4med_ddpo.lightning_modules.rewards.attributes import AttributeMatch
from rl4med_ddpo.lightning_modules.rewards.base import Reward
from rl4med_ddpo.lightning_modules.rewards.diversity import group_diversity


class DDPO(RewardFineTuning):
    """Trains a pipeline's U-Net so that its images earn more reward.

    One epoch is one rollout: M images are drawn from the current policy, scored, and trained on in
    `inner_epochs` rounds of `updates` optimizer steps each.

    Args:
        pipeline: The fine-tuned pipeline to start from: a folder, a .safetensors file or a hub id.
        unet: Folder of a U-Net that replaces the pipeline's; null keeps it.
        policy: Folder of the trained policy: `fit` exports its best one there, `test`,
            `predict` and `validate` read it, unless they are given a checkpoint. null scores the
            pipeline as it is (the paper's row "SD").
        judge: Checkpoint of the classifier that scores APR; never the reward's own weights.
        reward: What an image earns. The paper's is the share of attributes read as asked.
        train: Low-rank adapters on the attention layers, or the full U-Net.
        lora_rank: Rank of the adapters, and their alpha.
        optimizer: 3e-4 suits LoRA; the full U-Net wants 1e-5, 3e-4 turns its images black.
        max_grad_norm: The gradient is scaled down to this norm.
        steps: Denoising steps T of validation, test and predict, and of training.
        training_steps: Denoising steps of training, if it should have others than `steps`: fewer
            cost less. null takes `steps`.
        eta: Share of ancestral noise in each step, in (0, 1].
        guidance: Classifier-free guidance scale, in sampling and in training.
        updates: Optimizer steps of an inner epoch, each on its own part of the samples.
        inner_epochs: Rounds over one rollout, the K of Algorithm 1.
        clip_range: The ratio is clipped at 1 +- this, or between 1 - the first and 1 + the second
            of two. It acts on a log-prob averaged over the latent's dimensions: 1e-4 at 4x64x64;
            smaller latents want more, in inverse proportion.
        clip_dimensions: Dimensions of the latents that clip_range is meant for, 16384 at 4x64x64;
            it is then scaled to this pipeline's. null takes it as it is.
        trust_region: What ends a pair's part in an update: its ratio, which is clipped, or its KL
            divergence from the policy that sampled it, beyond which a pair is dropped whose
            advantage would push it on. The latter is exact where the ratio is noise, and keeps the
            noise predictions of a rollout: as much memory again as its latents.
        max_kl: KL divergence that trust_region: kl allows, averaged over the latent's dimensions
            as the log-prob is.
        step_weights: Whether a step's gradient counts as it comes, half of it from one of the last
            of 50 steps, or is divided by its sensitivity |d mean / d noise| / sigma, with mean 1
            over the trained steps. A learning rate that was stable without may not be with it.
        kl_weight: Weight, in the loss, of the divergence from the policy before training. Costs a
            forward pass more, and with train: full a second copy of the U-Net.
        baseline: Whose rewards a sample is compared with: its prompt's in this rollout, its
            prompt's in a window of the last 32, or nothing's (Eq. 2 with the raw reward).
        std_floor: Added to the rewards' standard deviation, in units of the reward.
        advantage_clip: Largest absolute advantage.
        diversity_weight: Weight, in the reward, of a sample's mean distance to the others of its
            prompt, in [0, 1] on 8x8 pixels.
        timestep_fraction: Share of each sample's steps that is trained, drawn again each time.
        timestep_window: First step that is trained, and the first after; 0 is the noisiest. null
            trains all of them.
        rollout_noise: Whether rollouts draw noise in all steps, or only in those of the
            timestep_window and are deterministic (eta 0) in the others. Validation, test and
            predict keep eta in all.
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

    configuration, model_name = "ddpo.yaml", "SD+RL"

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
        training_steps: int | None = None,
        eta: float = 1.0,
        guidance: float = 5.0,
        updates: int = 2,
        inner_epochs: int = 1,
        trust_region: Literal["clip", "kl"] = "clip",
        clip_range: float | tuple[float, float] = 1e-4,
        clip_dimensions: int | None = None,
        max_kl: float = 1e-5,
        step_weights: Literal["none", "equal"] = "none",
        kl_weight: float = 0.0,
        baseline: Literal["group", "window", "none"] = "group",
        std_floor: float = 0.05,
        advantage_clip: float = 5.0,
        diversity_weight: float = 0.0,
        timestep_fraction: float = 1.0,
        timestep_window: tuple[int, int] | None = None,
        rollout_noise: Literal["all", "window"] = "all",
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
        super().__init__(reward, optimizer)
        self.save_hyperparameters(ignore=["optimizer", "reward"])
        require_options(self.hparams)
        self.window = RewardWindow()
        standardise = {
            "group": group_advantages, "window": self.window.advantages, "none": raw_advantages,
        }[baseline]  # fmt: skip
        self.advantages = partial(standardise, std_floor=std_floor, clip=advantage_clip)
        self.idle = IdleRollouts()
        self.steps = training_steps or steps
        # first step that may be trained, and the first after; steps that each sample trains
        self.window_of_steps = timestep_window or (0, self.steps)
        first, end = self.window_of_steps
        self.trained_steps = max(1, round(timestep_fraction * (end - first)))
        # 0 until it is found, or taken from the checkpoint of a run that found it
        self.micro_batch = 0 if micro_batch == "auto" else micro_batch

    def setup(self, stage: str) -> None:
        """Refuse, before anything is loaded, what cannot work."""
        super().setup(stage)
        if stage != "fit":
            return
        require_unscaled_gradients(self.trainer.precision)
        data = self.trainer.datamodule
        samples = getattr(data, "samples_per_epoch", None)
        if samples is not None:
            require_divisible(samples, self.hparams.updates, self.trainer.world_size)
            require_groups(data.samples_per_prompt, self.hparams.baseline)

    def configure_model(self) -> None:
        """Put the parts together."""
        if hasattr(self, "model"):
            return
        super().configure_model()
        p = self.hparams
        noisy = self.window_of_steps if p.rollout_noise == "window" else None
        self.schedule = DDIMSchedule(self.model.noise_scheduler, self.steps, p.eta, noisy)
        weights = torch.ones(self.steps)
        if p.step_weights == "equal":
            weights = equal_weights(self.schedule.sensitivity(), self.window_of_steps)
        if p.kl_weight:
            self.keep_start()
        self.objective = PolicyObjective(
            self.model,
            self.schedule,
            weights,
            self.clip_range,
            p.max_kl if p.trust_region == "kl" else None,
            p.kl_weight,
            self.unet_before_training,
            p.guidance_in_training,
        )
        self.sampler = self.make_sampler()
        if p.gradient_checkpointing:
            self.model.unet.enable_gradient_checkpointing()

    def rollout_schedule(self) -> DDIMSchedule:
        """Return the transitions of the rollouts."""
        return self.schedule

    def make_sampler(self) -> RolloutSampler:
        """Return what draws the rollouts."""
        p = self.hparams
        return RolloutSampler(
            self.model, self.schedule, self.reward, p.seed, p.sample_batch,
            p.trajectory == "host", p.trust_region == "kl",
        )  # fmt: skip

    def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Refuse what does not divide; find the micro-batch, if that is asked for."""
        samples = len(batch["prompt"])
        require_divisible(samples, self.hparams.updates, self.trainer.world_size)
        self.epoch_of(samples)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Run one turn of Algorithm 1: sample, score, then K rounds of policy gradient steps."""
        p, started = self.hparams, time.monotonic()
        order = self.order(batch)
        mine = order[self.global_rank :: self.trainer.world_size]
        rollout = self.sampler.collect(batch, mine, self.current_epoch)
        groups = batch["prompt_id"][order].to(self.device)
        rewards = self.rewards(rollout, groups)
        sampled = time.monotonic()
        density = self.all_gather(rollout.log_probs.sum())
        if rewards.isfinite().all() and density.isfinite().all():
            advantages = self.advantages(rewards, groups)
            self.idle.count(advantages.values)
            if p.old_log_probs == "training":
                rollout = self.rescored(rollout, advantages.values)
            sums = [
                self.update(rollout, advantages.values, k, update)
                for k in range(p.inner_epochs)
                for update in range(p.updates)
            ]
            self.log_rewards_of_prompts(batch, order, rewards)
            self.log_epoch(advantages.flat_groups, sums)
        else:
            own = rewards[self.global_rank :: self.trainer.world_size]
            self.skip(faults_of_rollout(rollout, own))
        taken = time.monotonic() - started
        self.log("time/rollout_share", (sampled - started) / taken, batch_size=1)
        self.log_run(len(order), taken)

    @torch.no_grad()
    def rewards(self, rollout: Rollout, groups: Tensor) -> Tensor:
        """Gather the rewards of all ranks (Algorithm 1, line 5), `(M,)` in sample order."""
        progress.report("reward", 1, 1)
        terms: dict[str, Tensor] = {}
        if self.hparams.diversity_weight:
            appearance = self.gather_in_order(rollout.appearance.nan_to_num())
            diversity = group_diversity(appearance, groups)
            terms["diversity"] = self.hparams.diversity_weight * diversity
        return self.gather_rewards(rollout.scored, terms)

    @torch.no_grad()
    def rescored(self, rollout: Rollout, advantages: Tensor) -> Rollout:
        """Score all actions again, in the batches that will be trained."""
        again = replace(rollout, log_probs=rollout.log_probs.clone())
        scored, p = torch.zeros(rollout.log_probs.shape), self.hparams
        for k, update in product(range(p.inner_epochs), range(p.updates)):
            for pairs in self.passes(rollout, advantages, k, update):
                if not scored[pairs.row, pairs.step].all():
                    self.objective.rescore(again, pairs)
                    scored[pairs.row, pairs.step] = 1
        return again

    def update(self, rollout: Rollout, advantages: Tensor, k: int, update: int) -> Tensor:
        """Take one optimizer step on one part of the samples (Algorithm 1, line 6).

        Returns:
            The number of its pairs and the sums over them that are logged, `(5,)`.
        """
        passes = self.passes(rollout, advantages, k, update)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        losses = self.accumulate(rollout, passes)
        columns = torch.ones_like(losses.loss), losses.loss, losses.clipped
        columns += losses.sampling_kl, losses.reference_kl
        sums = torch.stack([column.double().sum() for column in columns])
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, self.hparams.max_grad_norm)
        # reduced over the ranks, so all of them agree
        if not norm.isfinite():
            self.skip(faults_of_update(self.objective, parameters, rollout, passes))
            return sums
        if k == update == 0:
            farthest = torch.stack([(losses.ratio - 1).abs().max(), losses.sampling_kl.max()])
            deviation, kl = self.all_gather(farthest).view(-1, 2).max(dim=0).values
            self.log("policy/ratio_deviation", deviation, batch_size=1)
            if self.objective.max_kl is None:
                limit = min(self.objective.clip_range)
                require_unit_ratio(deviation.item(), limit, self.trainer.precision)
            else:
                require_no_divergence(kl.item(), self.objective.max_kl, self.trainer.precision)
        self.log("policy/grad_norm", norm, batch_size=1)
        optimizer.step()
        self.skipped.in_a_row = 0
        return sums

    def accumulate(self, rollout: Rollout, passes: list[Pairs]) -> PolicyLoss:
        """Add up the gradients of an update, and return the loss of each of its pairs.

        Every rank runs the same number of passes, and the gradients of all passes are reduced over
        the ranks once, in the last.
        """
        pairs_in_all = len(rollout.index) // self.hparams.updates * self.trained_steps
        losses = []
        for i, pairs in enumerate(passes, start=1):
            with self.reduction(last=i == len(passes)):
                loss = self.objective(rollout, pairs)
                self.manual_backward(loss.loss.sum() / pairs_in_all)
            losses.append(loss._replace(loss=loss.loss.detach()))
            progress.report("update", i, len(passes))
        return PolicyLoss(*map(torch.cat, zip(*losses, strict=True)))

    def passes(self, rollout: Rollout, advantages: Tensor, k: int, update: int) -> list[Pairs]:
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

    def log_epoch(self, flat_groups: float, sums: list[Tensor]) -> None:
        """Log the share of tied prompts, and the means over all trained pairs."""
        pairs, *totals = torch.stack(sums).sum(dim=0)
        logged = ("loss", "clip_fraction", "sampling_kl", "reference_kl")
        for name, total in zip(logged, totals, strict=True):
            mean = (total / pairs).float()
            self.log(f"policy/{name}", mean, sync_dist=True, batch_size=1)
        self.log("reward/flat_groups", flat_groups, batch_size=1)

    def epoch_of(self, samples: int) -> Epoch:
        """Work out the sizes of an epoch of M samples; finds the micro-batch if need be."""
        p, ranks = self.hparams, self.trainer.world_size
        if not self.micro_batch:
            pairs = samples // ranks // p.updates * self.trained_steps
            with self.trainer.precision_plugin.forward_context():
                self.micro_batch = self.fitting_micro_batch(pairs)
        predictions = self.steps if p.trust_region == "kl" else 0
        states = self.steps + 1 + predictions
        return Epoch(
            samples=samples,
            ranks=ranks,
            sample_batch=min(self.sampler.batch, samples // ranks),
            steps=self.steps,
            trained_steps=self.trained_steps,
            micro_batch=self.micro_batch,
            updates=p.updates,
            inner_epochs=p.inner_epochs,
            latent_bytes=states * math.prod(self.model.latent_shape) * 4,
            on_host=p.trajectory == "host",
        )

    def fitting_micro_batch(self, pairs: int) -> int:
        """Find the largest micro-batch, up to some pairs, that fits into memory on every rank."""
        rollout = blank_rollout(self.steps, self.model.latent_shape, self.device)
        fitting = largest_micro_batch(
            lambda n: self.objective(rollout, blank_pairs(n, self.window_of_steps)).loss.sum(),
            pairs,
            free_memory(self.device),
        )
        return int(self.all_gather(torch.tensor(fitting, device=self.device)).min())

    @property
    def clip_range(self) -> tuple[float, float]:
        """How far the ratio may fall below 1 and rise above it, at this pipeline's latents."""
        meant_for, own = self.hparams.clip_dimensions, math.prod(self.model.latent_shape)
        scale = meant_for / own if meant_for else 1.0
        below, above = clip_pair(self.hparams.clip_range)
        return scale * below, scale * above

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what later rollouts depend on, besides weights and optimizer."""
        checkpoint["reward_window"] = self.window.history
        checkpoint["ddpo"] = {
            "micro_batch": self.micro_batch,
            "skipped": self.skipped.state(),
            "idle": self.idle.in_a_row,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore it."""
        super().on_load_checkpoint(checkpoint)
        self.window.history = checkpoint["reward_window"]
        # a checkpoint from before updates were skipped has nothing to count on from
        if kept := checkpoint.get("ddpo"):
            self.skipped.load(kept["skipped"])
            self.idle.in_a_row = kept.get("idle", 0)
            if self.hparams.micro_batch == "auto":
                self.micro_batch = kept["micro_batch"]


def _rows(column: list[Any] | Tensor, rows: list[int]) -> list[Any] | Tensor:
    return column[rows] if isinstance(column, Tensor) else [column[row] for row in rows]
