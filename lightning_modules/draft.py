"""DRaFT: fine-tune on the gradient of a differentiable reward (Clark et al. 2024)."""

import math
import time
from typing import Any, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from rl4med_ddpo.foundation.progress import progress
from rl4med_ddpo.foundation.randomness import keys
from rl4med_ddpo.lightning_modules.policy_gradient.micro_batch import (
    free_memory,
    largest_micro_batch,
)
from rl4med_ddpo.lightning_modules.policy_gradient.non_finite import Fault
from rl4med_ddpo.lightning_modules.policy_gradient.options import (
    require_in_range,
    require_last_steps,
    require_unscaled_gradients,
)
from rl4med_ddpo.lightning_modules.policy_gradient.rollout import require_divisible
from rl4med_ddpo.lightning_modules.reward_fine_tuning import RewardFineTuning
from rl4med_ddpo.lightning_modules.reward_gradient.sampler import DifferentiableSampler
from rl4med_ddpo.lightning_modules.rewards.attributes import AttributeMatch
from rl4med_ddpo.lightning_modules.rewards.base import (
    Reward,
    Rewards,
    joined,
    require_loss,
    scored,
)


class DRaFT(RewardFineTuning):
    """Trains a pipeline's U-Net on the gradient of its images' reward, back through sampling.

    Where the reward is a network, its gradient says how an image should change; DDPO only learns
    which of its images were better. One epoch draws M images, in `updates` parts with an optimizer
    step each. The loss is the reward's own differentiable form (`Reward.loss`) and, weighted, how
    far the noise predictions have moved from those before training.

    Args:
        pipeline: The fine-tuned pipeline to start from: a folder, a .safetensors file or a hub id.
        unet: Folder of a U-Net that replaces the pipeline's; null keeps it.
        policy: Folder of the trained policy: `fit` exports its best one there, `test`,
            `predict` and `validate` read it, unless they are given a checkpoint. null scores the
            pipeline as it is (the paper's row "SD").
        judge: Checkpoint of the classifier that scores APR; never the reward's own weights.
        reward: What an image earns. It needs a `loss`; the paper's has the classifier's
            cross-entropy.
        train: Low-rank adapters on the attention layers, or the full U-Net.
        lora_rank: Rank of the adapters, and their alpha.
        optimizer: 3e-4 suits LoRA, 1e-5 the full U-Net.
        max_grad_norm: The gradient is scaled down to this norm.
        steps: Denoising steps T.
        last_steps: Steps that the gradient goes back through, the last ones of the T; null all of
            them. Few cost less, and hack more: the late steps decide details.
        eta: Share of ancestral noise in each step, in (0, 1].
        guidance: Classifier-free guidance scale, in sampling and in training.
        updates: Optimizer steps of an epoch, each on its own part of the samples.
        penalty: Weight, in the loss, of the mean squared change of the noise prediction since
            before training. It holds diversity; 0 costs nothing, else a step in each sample's
            trajectory is evaluated twice more, and train: full keeps a second copy of the U-Net.
        gradient_checkpointing: Keep few of a step's activations and compute the others again.
        compile: torch.compile's backend for the U-Net, such as inductor; null leaves it as it is.
        sample_batch: Images drawn at a time on each device in validation, test and predict.
        micro_batch: Images per forward and backward pass on each device; auto takes as many as fit
            into memory, up to 64.
        max_skipped: Updates in a row that may be skipped because they are NaN or infinite.
        seed: Decides every draw together with the epoch and the sample's global index.
    """

    configuration, model_name = "draft.yaml", "SD+DRaFT"

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
        last_steps: int | None = None,
        eta: float = 1.0,
        guidance: float = 5.0,
        updates: int = 4,
        penalty: float = 5.0,
        gradient_checkpointing: bool = False,
        compile: str | None = None,
        sample_batch: int = 8,
        micro_batch: int | Literal["auto"] = 4,
        max_skipped: int = 3,
        seed: int = 42,
    ) -> None:
        super().__init__(reward, optimizer)
        self.save_hyperparameters(ignore=["optimizer", "reward"])
        require_in_range(self.hparams)
        require_last_steps(last_steps, steps)
        require_loss(reward)
        # 0 until it is found, or taken from the checkpoint of a run that found it
        self.micro_batch = 0 if micro_batch == "auto" else micro_batch

    def setup(self, stage: str) -> None:
        """Refuse, before anything is loaded, what cannot work."""
        super().setup(stage)
        if stage != "fit":
            return
        require_unscaled_gradients(self.trainer.precision)
        samples = getattr(self.trainer.datamodule, "samples_per_epoch", None)
        if samples is not None:
            require_divisible(samples, self.hparams.updates, self.trainer.world_size)

    def configure_model(self) -> None:
        """Put the parts together."""
        if hasattr(self, "model"):
            return
        super().configure_model()
        p = self.hparams
        start = None
        if p.penalty:
            self.keep_start()
            start = self.unet_before_training
        self.sampler = DifferentiableSampler(self.model, p.last_steps or p.steps, start)
        if p.gradient_checkpointing:
            self.model.unet.enable_gradient_checkpointing()

    def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Refuse what does not divide; find the micro-batch, if that is asked for."""
        self.passes_of(len(batch["prompt"]))

    def passes_of(self, samples: int) -> int:
        """Count the passes of an update in an epoch of M samples; finds the micro-batch if need be.

        Raises:
            UserError: if the samples do not divide.
        """
        ranks, updates = self.trainer.world_size, self.hparams.updates
        require_divisible(samples, updates, ranks)
        share = samples // ranks // updates
        if not self.micro_batch:
            with self.trainer.precision_plugin.forward_context():
                self.micro_batch = self.fitting_micro_batch(share)
        return math.ceil(share / self.micro_batch)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Draw the samples of an epoch in parts, and step along each part's reward gradient."""
        started = time.monotonic()
        order = self.order(batch)
        mine = order[self.global_rank :: self.trainer.world_size]
        parts = mine.chunk(self.hparams.updates)
        earned, losses = zip(*(self.update(batch, rows) for rows in parts), strict=True)
        rewards = self.gather_rewards(joined(list(earned)), {})
        self.log_rewards_of_prompts(batch, order, rewards)
        for name, mean in zip(("loss", "penalty"), torch.stack(losses).mean(dim=0), strict=True):
            self.log(f"reward_gradient/{name}", mean, sync_dist=True, batch_size=1)
        self.log_run(len(order), time.monotonic() - started)

    def update(self, batch: dict[str, Any], rows: Tensor) -> tuple[Rewards, Tensor]:
        """Take one optimizer step on some of this rank's samples.

        Returns:
            What they earned, and the means of the reward's loss and of the penalty, `(2,)`.
        """
        optimizer = self.optimizers()
        optimizer.zero_grad()
        earned: list[Rewards] = []
        losses: list[Tensor] = []
        parts = rows.split(self.micro_batch)
        for i, part in enumerate(parts, start=1):
            with self.reduction(last=i == len(parts)):
                images, loss = self.losses(batch, part)
                self.manual_backward(loss.sum() / len(rows))
            with torch.no_grad():
                conditions = batch["condition"][part].to(self.device)
                earned.append(scored(self.reward, images.detach(), conditions))
            losses.append(loss.detach())
            progress.report("update", i, len(parts))
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, self.hparams.max_grad_norm)
        # reduced over the ranks, so all of them agree
        if norm.isfinite():
            self.log("reward_gradient/grad_norm", norm, batch_size=1)
            optimizer.step()
            self.skipped.in_a_row = 0
        else:
            self.skip(self.faults(batch, rows))
        return joined(earned), torch.cat(losses, dim=1).mean(dim=1)

    def losses(self, batch: dict[str, Any], rows: Tensor) -> tuple[Tensor, Tensor]:
        """Draw some samples, and return the images and the addends of their loss.

        Returns:
            Images `(B, 3, H, W)`; the reward's loss and the weighted penalty, `(2, B)`.
        """
        noise_keys = keys(self.hparams.seed, "rollout", self.current_epoch, batch["index"][rows])
        draws = self.sampler.draw([batch["prompt"][row] for row in rows.tolist()], noise_keys)
        images = self.model.decode(draws.latents)
        loss = self.reward.loss(images, batch["condition"][rows].to(self.device))
        return images, torch.stack([loss, self.hparams.penalty * draws.change])

    def faults(self, batch: dict[str, Any], rows: Tensor) -> list[Fault]:
        """Find this rank's samples whose loss or gradient is not finite; no other rank is asked."""
        found = []
        for row in rows.split(1):
            loss = self.losses(batch, row)[1].sum()
            gradients = torch.autograd.grad(loss, self.trained_parameters(), allow_unused=True)
            if all(bool(x.isfinite().all()) for x in (loss, *gradients) if x is not None):
                continue
            what, value = ("gradient", float("nan")) if loss.isfinite() else ("loss", loss.item())
            found.append(Fault(what, value, batch["prompt"][int(row)], int(batch["index"][row])))
        return found

    def fitting_micro_batch(self, samples: int) -> int:
        """Find the largest micro-batch, up to some samples, that fits into memory on every rank."""

        def of_a_step(n: int) -> Tensor:
            """Run what a pass holds at once, and a little more: a step, the decoder, the reward."""
            latents = torch.zeros(n, *self.model.latent_shape, device=self.device)
            text = self.model.embed([""] * n)
            last = self.sampler.follow(latents, latents, self.model.schedule.steps - 1, text)
            conditions = torch.zeros(n, self.attributes, device=self.device)
            return self.reward.loss(self.model.decode(last), conditions).sum()

        fitting = largest_micro_batch(of_a_step, samples, free_memory(self.device))
        return int(self.all_gather(torch.tensor(fitting, device=self.device)).min())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what later epochs depend on, besides weights and optimizer."""
        checkpoint["draft"] = {"micro_batch": self.micro_batch, "skipped": self.skipped.state()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore it."""
        super().on_load_checkpoint(checkpoint)
        self.skipped.load(checkpoint["draft"]["skipped"])
        if self.hparams.micro_batch == "auto":
            self.micro_batch = checkpoint["draft"]["micro_batch"]
