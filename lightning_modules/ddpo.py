"""Stage 2: align images with their prompts by DDPO (RL4Med-DDPO, Algorithm 1)."""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import product
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
from rl4med_ddpo.foundation.progress import progress
from rl4med_ddpo.foundation.randomness import generator, key, keys
from rl4med_ddpo.lightning_modules.classifier import load_classifier, require_same_attributes
from rl4med_ddpo.lightning_modules.diffusion.lora import add_lora, load_policy, save_lora
from rl4med_ddpo.lightning_modules.pipelines.load import load_pipeline
from rl4med_ddpo.lightning_modules.pipelines.source import is_hub_id
from rl4med_ddpo.lightning_modules.policy_gradient.divergence import divergence_from_start
from rl4med_ddpo.lightning_modules.policy_gradient.epoch import Epoch
from rl4med_ddpo.lightning_modules.policy_gradient.idle_rollouts import IdleRollouts
from rl4med_ddpo.lightning_modules.policy_gradient.micro_batch import (
    free_memory,
    largest_micro_batch,
)
from rl4med_ddpo.lightning_modules.policy_gradient.non_finite import (
    FOLDER,
    REDRAW_SETTINGS,
    Fault,
    SkippedUpdates,
    faults_of_rollout,
    faults_of_update,
    write_faults,
)
from rl4med_ddpo.lightning_modules.policy_gradient.objective import (
    PolicyLoss,
    PolicyObjective,
    RewardWindow,
    group_advantages,
    raw_advantages,
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
from rl4med_ddpo.lightning_modules.policy_gradient.scorer import PolicyScorer, require_independent
from rl4med_ddpo.lightning_modules.prerequisites import Prerequisite, require
from rl4med_ddpo.lightning_modules.rewards.attributes import AttributeMatch
from rl4med_ddpo.lightning_modules.rewards.base import Reward, require_form, scored
from rl4med_ddpo.lightning_modules.rewards.diversity import group_diversity
from rl4med_ddpo.lightning_modules.samples import Samples, filled_rows
from rl4med_ddpo.lightning_modules.text_to_image import TextToImage
from rl4med_ddpo.lightning_modules.trained_weights import announce


class DDPO(TextToImage):
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
        timestep_fraction: Share of each sample's steps that is trained, drawn again each time.
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

    # narrower than Lightning declares them
    all_gather: Callable[[Tensor], Tensor]
    optimizers: Callable[[], LightningOptimizer]

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
        self.optimizer, self.reward = optimizer, reward
        self.window = RewardWindow()
        standardise = {
            "group": group_advantages, "window": self.window.advantages, "none": raw_advantages,
        }[baseline]  # fmt: skip
        self.advantages = partial(standardise, std_floor=std_floor, clip=advantage_clip)
        self.skipped, self.idle = SkippedUpdates(), IdleRollouts()
        # digest of the U-Net that training starts from, once an evaluation has loaded it
        self.before_training: str | None = None
        self.scores_are_whole = True
        # first step that may be trained, and the first after; steps that each sample trains
        self.window_of_steps = timestep_window or (0, steps)
        first, end = self.window_of_steps
        self.trained_steps = max(1, round(timestep_fraction * (end - first)))
        # 0 until it is found, or taken from the checkpoint of a run that found it
        self.micro_batch = 0 if micro_batch == "auto" else micro_batch

    def setup(self, stage: str) -> None:
        """Refuse, before anything is loaded, what cannot work."""
        super().setup(stage)
        require(self.prerequisites(stage))
        if stage != "fit":
            return
        require_unscaled_gradients(self.trainer.precision)
        if self.trained_from is not None and self.trained_from == self.hparams.policy:
            raise UserError(
                f"policy={self.hparams.policy} was read outside of a trainer, to draw from: it is "
                "not trained further.\n  Let the trainer put the module together, or leave "
                "policy out"
            )
        data = self.trainer.datamodule
        samples = getattr(data, "samples_per_epoch", None)
        if samples is not None:
            require_divisible(samples, self.hparams.updates, self.trainer.world_size)
            require_groups(data.samples_per_prompt, self.hparams.baseline)

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
            made_by = "rl4med-ddpo fit --config ddpo.yaml"
            found.append(Prerequisite(self.hparams.policy, "the trained policy", made_by))
        return found

    def configure_model(self) -> None:
        """Load the pipeline, the reward's networks and the judge, and put the parts together."""
        if hasattr(self, "model"):
            return
        super().configure_model()
        p = self.hparams
        with torch.device("cpu"):
            self.reward.load()
            self.scorer = self.make_scorer()
            self.try_reward(torch.device("cpu"))
        self.objective = PolicyObjective(
            self.model, self.clip_range, p.kl_weight, p.guidance_in_training
        )
        self.sampler = self.make_sampler()
        if p.gradient_checkpointing:
            self.model.unet.enable_gradient_checkpointing()
        if p.compile:
            self.model.unet.compile(backend=p.compile)

    def make_scorer(self) -> PolicyScorer:
        """Load the judge, which must be another network than the reward's."""
        judge = load_classifier(self.hparams.judge, heads="any_of")
        readers = {f"the judge {self.hparams.judge}": judge.vocabulary}
        require_independent(judge, self.reward, self.hparams.judge)
        for number, network in enumerate(self.reward.classifiers(), start=1):
            readers[f"network {number} of the reward"] = network.vocabulary
        data = self._trainer and getattr(self.trainer.datamodule, "vocabulary", None)
        if data:
            require_same_attributes(data, readers)
        return PolicyScorer(judge)

    def make_sampler(self) -> RolloutSampler:
        """Return what draws the rollouts."""
        p = self.hparams
        return RolloutSampler(
            self.model, self.reward, p.seed, p.sample_batch, p.trajectory == "host"
        )

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
        attributes = len(self.scorer.judge.module.vocabulary.attributes)
        require_form(self.reward, self.model.image_size, attributes, device)

    def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Refuse what does not divide; find the micro-batch, if that is asked for."""
        samples = len(batch["prompt"])
        require_divisible(samples, self.hparams.updates, self.trainer.world_size)
        self.epoch_of(samples)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Run one turn of Algorithm 1: sample, score, then K rounds of policy gradient steps."""
        p, started = self.hparams, time.monotonic()
        # position i of the order is rank i mod W's, and an update takes a run of positions: so it
        # trains on the same samples for any number of ranks W
        shuffle = generator(key(p.seed, "order", self.current_epoch))
        order = torch.randperm(len(batch["prompt"]), generator=shuffle)
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
            names = [batch["name"][i] for i in order.tolist()]
            self.log_epoch(names, rewards, advantages.flat_groups, sums)
        else:
            own = rewards[self.global_rank :: self.trainer.world_size]
            self.skip(faults_of_rollout(rollout, own))
        ended = time.monotonic()
        run = {
            "trainer/optimizer_steps": float(self.global_step),
            "trainer/skipped_updates": float(self.skipped.total),
            "time/samples_per_second": len(order) / (ended - started),
            "time/rollout_share": (sampled - started) / (ended - started),
        }
        self.log_dict(run, batch_size=1)

    @torch.no_grad()
    def rewards(self, rollout: Rollout, groups: Tensor) -> Tensor:
        """Gather the rewards of all ranks (Algorithm 1, line 5), `(M,)` in sample order."""
        mine = rollout.scored
        progress.report("reward", 1, 1)
        rewards = self.gather_in_order(mine.value)
        terms = {name: self.gather_in_order(term) for name, term in mine.terms.items()}
        if self.hparams.diversity_weight:
            appearance = self.gather_in_order(rollout.appearance.nan_to_num())
            diversity = group_diversity(appearance, groups)
            terms["diversity"] = self.hparams.diversity_weight * diversity
            rewards = rewards + terms["diversity"]
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

    def gather_in_order(self, values: Tensor) -> Tensor:
        """Interleave the ranks' `(n, ...)` into `(M, ...)`: position p is rank p mod W's."""
        ranks = self.all_gather(values).reshape(self.trainer.world_size, *values.shape)
        return ranks.transpose(0, 1).flatten(0, 1)

    @torch.no_grad()
    def rescored(self, rollout: Rollout, advantages: Tensor) -> Rollout:
        """Score all actions again, in the batches that will be trained."""
        log_probs, scored = rollout.log_probs.clone(), torch.zeros(rollout.log_probs.shape)
        p = self.hparams
        for k, update in product(range(p.inner_epochs), range(p.updates)):
            for pairs in self.passes(rollout, advantages, k, update):
                if not scored[pairs.row, pairs.step].all():
                    log_probs[pairs.row, pairs.step] = self.objective(rollout, pairs).log_prob
                    scored[pairs.row, pairs.step] = 1
        return replace(rollout, log_probs=log_probs)

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
        columns += losses.approximate_kl, losses.reference_kl
        sums = torch.stack([column.double().sum() for column in columns])
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, self.hparams.max_grad_norm)
        # reduced over the ranks, so all of them agree
        if not norm.isfinite():
            self.skip(faults_of_update(self.objective, parameters, rollout, passes))
            return sums
        if k == update == 0:
            deviation = self.all_gather((losses.ratio - 1).abs().max()).max()
            self.log("policy/ratio_deviation", deviation, batch_size=1)
            require_unit_ratio(
                deviation.item(), min(self.objective.clip_range), self.trainer.precision
            )
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
        strategy, losses = self.trainer.strategy, []
        for i, pairs in enumerate(passes, start=1):
            if i < len(passes) and isinstance(strategy, ParallelStrategy):
                reduction = strategy.block_backward_sync()
            else:
                reduction = nullcontext()
            with reduction:
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

    def log_epoch(
        self, names: list[str], rewards: Tensor, flat_groups: float, sums: list[Tensor]
    ) -> None:
        """Log each prompt's mean reward by its short name, and the means over all trained pairs."""
        for name in sorted(set(names)):
            rows = [row for row, other in enumerate(names) if other == name]
            self.log(f"reward_of_prompt/{name}", rewards[rows].mean(), batch_size=1)
        pairs, *totals = torch.stack(sums).sum(dim=0)
        logged = ("loss", "clip_fraction", "approximate_kl", "reference_kl")
        for name, total in zip(logged, totals, strict=True):
            mean = (total / pairs).float()
            self.log(f"policy/{name}", mean, sync_dist=True, batch_size=1)
        self.log("reward/flat_groups", flat_groups, batch_size=1)

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
            draw = {option: self.hparams[option] for option in REDRAW_SETTINGS}
            draw["epoch"] = self.current_epoch
            write_faults(file, everyone, draw, self.state_dict())
        self.skipped.add(everyone, file, self.hparams.max_skipped)

    def epoch_of(self, samples: int) -> Epoch:
        """Work out the sizes of an epoch of M samples; finds the micro-batch if need be."""
        p, ranks = self.hparams, self.trainer.world_size
        if not self.micro_batch:
            pairs = samples // ranks // p.updates * self.trained_steps
            with self.trainer.precision_plugin.forward_context():
                self.micro_batch = self.fitting_micro_batch(pairs)
        return Epoch(
            samples=samples,
            ranks=ranks,
            sample_batch=min(self.sampler.batch, samples // ranks),
            steps=p.steps,
            trained_steps=self.trained_steps,
            micro_batch=self.micro_batch,
            updates=p.updates,
            inner_epochs=p.inner_epochs,
            latent_bytes=(p.steps + 1) * math.prod(self.model.latent_shape) * 4,
            on_host=p.trajectory == "host",
        )

    def fitting_micro_batch(self, pairs: int) -> int:
        """Find the largest micro-batch, up to some pairs, that fits into memory on every rank."""
        steps = self.hparams.steps
        rollout = blank_rollout(steps, self.model.latent_shape, self.device)
        fitting = largest_micro_batch(
            lambda n: self.objective(rollout, blank_pairs(n, steps)).loss.sum(),
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
        """Read the U-Net that training started from."""
        return load_pipeline(self.hparams.pipeline, self.hparams.unet).unet

    def on_validation_epoch_end(self) -> None:
        """Log the scores over all processes, and the divergence that they were bought with."""
        self.log("val/apr", self.scorer.apr.compute().rate, prog_bar=True)
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
        rows = filled_rows(n, self.hparams.sample_batch)
        filled = {name: _rows(column, rows) for name, column in batch.items()}
        return self.samples(filled).select(missing)

    def samples(self, batch: dict[str, Any]) -> Samples:
        """Draw and score the images of a batch."""
        noise_keys = keys(self.hparams.seed, "test", 0, batch["index"])
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

    def export(self, folder: Path) -> None:
        """Write the policy: its adapters, or the whole pipeline if the full U-Net was trained."""
        if self.hparams.train == "lora":
            save_lora(self.model.unet, folder)
        else:
            super().export(folder)

    def networks(self) -> dict[str, nn.Module]:
        """Name the networks that decide an image and its scores."""
        return super().networks() | {"reward": self.reward, "judge": self.scorer.judge}

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
