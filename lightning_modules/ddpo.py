"""Stage 2: align images with their prompts by DDPO (RL4Med-DDPO, Algorithm 1)."""

import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import UNet2DConditionModel
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from datamodules.attributes import prompt_id, short_name
from datamodules.errors import UserError
from lightning_modules.advantages import Advantages, RewardWindow, group_advantages
from lightning_modules.ddim import denoise
from lightning_modules.lora import add_lora, load_policy, save_lora
from lightning_modules.pipelines import is_hub_id
from lightning_modules.policy_evaluation import PolicyEvaluation
from lightning_modules.policy_gradient import PolicyLoss, clipped_policy_loss
from lightning_modules.randomness import generator, key, keys
from lightning_modules.rewards import AttributeMatch, Reward, Rewards
from lightning_modules.rollout import Pairs, Rollout, plan_passes, sample_order
from lightning_modules.stages import Need, require
from lightning_modules.text_to_image import TextToImage


class DDPO(PolicyEvaluation, TextToImage):
    """Trains a pipeline's U-Net so that its images earn more reward.

    One epoch is one rollout: M images are drawn from the current policy, scored, and trained on in
    `inner_epochs` rounds of `updates` optimizer steps each.

    Args:
        pipeline: Folder or hub id of the fine-tuned pipeline to start from.
        policy: Folder of the trained policy: `fit` exports its best one there, `test` and
            `predict` read it. null scores the pipeline as it is (the paper's row "SD").
        judge: Checkpoint of the classifier that scores APR; never the reward's own weights.
        reward: What an image earns. The paper's is the share of attributes read as asked.
        train: Low-rank adapters on the attention layers, or the full U-Net.
        lora_rank: Rank of the adapters, and their alpha.
        optimizer: 3e-4 suits LoRA; the full U-Net wants 1e-5, 3e-4 turns its images black.
        max_grad_norm: The gradient is scaled down to this norm.
        steps: Denoising steps T; sampling, training and evaluation take the same.
        eta: Share of ancestral noise in each step; above 0.
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
        sample_batch: Images sampled at a time on each device.
        micro_batch: (sample, step) pairs per forward and backward pass on each device.
        seed: Decides every draw together with the epoch and the sample's global index.
    """

    def __init__(
        self,
        pipeline: str = "runs/sd/pipeline",
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
        sample_batch: int = 8,
        micro_batch: int = 8,
        seed: int = 42,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["optimizer", "reward"])
        if not 0 < timestep_fraction <= 1:
            raise UserError(f"timestep_fraction={timestep_fraction}: allowed are (0, 1]")
        self.automatic_optimization = False
        self.optimizer, self.reward, self.window = optimizer, reward, RewardWindow()

    def setup(self, stage: str) -> None:
        """Check that the earlier stages have left what this one starts from."""
        needs = self.reward.needs()
        needs += [Need(self.hparams.judge, "the judge", "python run.py fit --config judge.yaml")]
        if not is_hub_id(self.hparams.pipeline):
            made_by = "python run.py fit --config sd.yaml"
            needs += [Need(self.hparams.pipeline, "the fine-tuned pipeline", made_by)]
        if stage in ("test", "predict") and self.hparams.policy:
            made_by = "python run.py fit --config ddpo.yaml"
            needs += [Need(self.hparams.policy, "the trained policy", made_by)]
        require(needs)

    def configure_model(self) -> None:
        if not hasattr(self, "unet"):
            super().configure_model()
            self.load_scorers()

    def prepare_unet(self, unet: UNet2DConditionModel) -> None:
        """Make the policy: trainable for `fit`, the exported one for `test` and `predict`."""
        if self.trainer.state.fn in (TrainerFn.TESTING, TrainerFn.PREDICTING):
            if self.hparams.policy:
                load_policy(unet, Path(self.hparams.policy))
        elif self.hparams.train == "lora":
            add_lora(unet, self.hparams.lora_rank, seed=self.hparams.seed)
        else:
            unet.requires_grad_(True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.trained_parameters())

    def on_fit_start(self) -> None:
        if self.trainer.precision == "16-mixed":
            raise UserError(
                "precision 16-mixed scales the gradients before they are clipped, which would "
                "shrink every update: use --trainer.precision bf16-mixed or 32-true"
            )

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
        self.log("time/samples_per_second", len(order) / (time.monotonic() - started), batch_size=1)
        self.log(
            "time/rollout_share", (sampled - started) / (time.monotonic() - started), batch_size=1
        )

    def order(self, samples: int) -> Tensor:
        """Order the epoch's global sample indices; position p is rank p mod W's."""
        parts = self.trainer.world_size * self.hparams.updates
        if samples % parts:
            fitting = [n for n in (samples // parts * parts, -(-samples // parts) * parts) if n]
            raise UserError(
                f"{samples} samples an epoch do not divide into {self.hparams.updates} updates on "
                f"{self.trainer.world_size} processes: samples_per_epoch must be a multiple of "
                f"{parts}; the nearest are {' and '.join(map(str, fitting))}"
            )
        return sample_order(samples, self.hparams.seed, self.current_epoch)

    @torch.no_grad()
    def rollout(self, batch: dict[str, Any], order: Tensor) -> Rollout:
        """Draw this rank's samples with their intermediate states (Algorithm 1, line 4)."""
        mine = order[self.global_rank :: self.trainer.world_size]
        prompts = [batch["prompt"][i] for i in mine.tolist()]
        noise_keys = keys(self.hparams.seed, "rollout", self.current_epoch, batch["index"][mine])
        empty, trajectories, log_probs, images = self.embed([""])[0], [], [], []
        for first in range(0, len(mine), self.hparams.sample_batch):
            part = slice(first, first + self.hparams.sample_batch)
            text = self.embed(prompts[part])
            latents, generators = self.noise_of(noise_keys[part])
            states, densities = [latents], []
            for action in denoise(
                lambda x, step, text=text: self.guided_noise(x, step, text, empty),
                self.schedule, latents, generators,
            ):  # fmt: skip
                states.append(action.previous)
                densities.append(action.log_prob)
                self.report_progress(
                    "rollout",
                    first * len(self.schedule) + len(text) * len(densities),
                    len(mine) * len(self.schedule),
                )
            trajectories.append(torch.stack(states, dim=1))
            log_probs.append(torch.stack(densities, dim=1))
            images.append(self.decode(states[-1]))
        return Rollout(
            index=batch["index"][mine],
            prompts=prompts,
            conditions=batch["condition"][mine].to(self.device),
            latents=torch.cat(trajectories),
            log_probs=torch.cat(log_probs),
            images=torch.cat(images),
        )

    @torch.no_grad()
    def rewards(self, rollout: Rollout) -> Tensor:
        """Score the images (Algorithm 1, line 5) and gather all ranks', `(M,)` in sample order."""
        mine: Rewards = self.reward(rollout.images, rollout.conditions)
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
        groups = torch.tensor([prompt_id(batch["prompt"][i]) for i in order.tolist()])
        groups = groups.to(rewards.device)
        for group in groups.unique().tolist():
            name = short_name(batch["condition"][order][groups.cpu() == group][0])
            self.log(f"reward_of_prompt/{name}", rewards[groups == group].mean(), batch_size=1)
        if self.hparams.baseline == "none":
            return Advantages(rewards, 0.0)
        standardise = group_advantages
        if self.hparams.baseline == "window":
            standardise = self.window.advantages
        return standardise(rewards, groups, self.hparams.std_floor, self.hparams.advantage_clip)

    def update(self, rollout: Rollout, advantages: Tensor, update: int, k: int) -> PolicyLoss:
        """Take one optimizer step on one part of the samples (Algorithm 1, line 6).

        Every rank runs the same number of passes, and the gradients of all passes are reduced over
        the ranks once, in the last.
        """
        passes = self.passes(rollout, advantages, update, k)
        samples = len(rollout.index) // self.hparams.updates
        optimizer = self.optimizers()
        optimizer.zero_grad()
        results = []
        for i, pairs in enumerate(passes, start=1):
            with nullcontext() if i == len(passes) else self.without_reduction():
                result = self.policy_loss(rollout, pairs)
                self.manual_backward(result.loss.sum() / (samples * self.trained_steps))
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
        first = update * share
        by_rank = advantages.cpu().view(-1, self.trainer.world_size)[first : first + share]

        def chosen(row: int) -> Tensor:
            index = int(rollout.index[first + row])
            draw = generator(key(self.hparams.seed, "timesteps", self.current_epoch, k, index))
            return torch.randperm(len(self.schedule), generator=draw)[: self.trained_steps]

        planned = plan_passes(by_rank, self.global_rank, chosen, self.hparams.micro_batch)
        return [
            Pairs(*(column.to(self.device) for column in (p.row + first, p.step, p.advantage)))
            for p in planned
        ]

    def policy_loss(self, rollout: Rollout, pairs: Pairs) -> PolicyLoss:
        """Evaluate Eq. 2 with a clipped ratio on some pairs of the rollout."""
        latents = rollout.latents[pairs.row, pairs.step]
        text = self.embed([rollout.prompts[row] for row in pairs.row.tolist()])
        noise = self.guided_noise(latents, pairs.step, text, self.embed([""])[0])
        previous = rollout.latents[pairs.row, pairs.step + 1]
        log_prob = self.schedule.log_prob(previous, latents, noise, pairs.step)
        return clipped_policy_loss(
            log_prob,
            rollout.log_probs[pairs.row, pairs.step],
            pairs.advantage,
            self.hparams.clip_range,
        )

    def check_ratio(self, first: PolicyLoss) -> None:
        """Log how far the ratio is from 1 before any update, and refuse what clipping would eat."""
        deviation = self.all_gather((first.ratio - 1).abs().max()).max()
        self.log("policy/ratio_deviation", deviation, batch_size=1)
        if not deviation < self.hparams.clip_range:
            raise UserError(
                f"the ratio of unchanged weights is off 1 by {deviation:.1e}, which the clip range "
                f"{self.hparams.clip_range:g} would take for a policy change: the precision "
                f"{self.trainer.precision} is too low for it. Use --trainer.precision 32-true, or "
                "a wider clip_range"
            )

    def without_reduction(self) -> AbstractContextManager:
        """Accumulate gradients on this rank alone."""
        strategy = self.trainer.strategy
        parallel = isinstance(strategy, ParallelStrategy)
        return strategy.block_backward_sync() if parallel else nullcontext()

    def trained_parameters(self) -> list[nn.Parameter]:
        return [p for p in self.unet.parameters() if p.requires_grad]

    @property
    def trained_steps(self) -> int:
        return max(1, round(self.hparams.timestep_fraction * len(self.schedule)))

    def log_training(self, results: list[PolicyLoss], advantages: Advantages) -> None:
        """Log the means over all pairs of the epoch."""
        loss, _, clipped, kl = map(torch.cat, zip(*results, strict=True))
        for name, values in (("loss", loss), ("clip_fraction", clipped), ("approximate_kl", kl)):
            self.log(f"policy/{name}", values.float().mean(), sync_dist=True, batch_size=1)
        self.log("reward/flat_groups", advantages.flat_groups, batch_size=1)
        self.log("trainer/optimizer_steps", float(self.global_step), batch_size=1)

    def export(self, folder: Path) -> None:
        """Write the policy: its adapters, or the whole pipeline if the full U-Net was trained."""
        if self.hparams.train == "lora":
            save_lora(self.unet, folder)
        else:
            super().export(folder)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["reward_window"] = self.window.history

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.window.history = checkpoint["reward_window"]
