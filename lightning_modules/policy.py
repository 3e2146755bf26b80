"""The policy as a network: what it starts from, which of its weights train, what it leaves."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torchmetrics import MeanMetric

from rl4med_ddpo.foundation.errors import UserError
from rl4med_ddpo.foundation.randomness import keys
from rl4med_ddpo.lightning_modules.diffusion.lora import (
    add_lora,
    load_policy,
    save_lora,
    without_lora,
)
from rl4med_ddpo.lightning_modules.pipelines.load import load_pipeline
from rl4med_ddpo.lightning_modules.pipelines.source import is_hub_id
from rl4med_ddpo.lightning_modules.policy_evaluation import PolicyEvaluation
from rl4med_ddpo.lightning_modules.policy_gradient.ranges import require_in_range
from rl4med_ddpo.lightning_modules.policy_gradient.rollout import require_divisible
from rl4med_ddpo.lightning_modules.prerequisites import Need, require
from rl4med_ddpo.lightning_modules.text_to_image import TextToImage


class Policy(PolicyEvaluation, TextToImage):
    """A pipeline whose U-Net, or adapters on it, are trained for a reward.

    Subclasses take `pipeline`, `policy`, `judge`, `train`, `lora_rank`, `updates`, `compile`,
    `gradient_checkpointing`, `guidance_in_training`, `sample_batch` and `seed` as hyperparameters
    and set `reward` and `optimizer`.
    """

    optimizer: OptimizerCallable

    def setup(self, stage: str) -> None:
        """Refuse, before anything is loaded, what cannot work."""
        require_in_range(self.hparams)
        require(self.needs(stage))
        if stage == "fit":
            self.require_precision(self.trainer.precision)
        samples = getattr(self.trainer.datamodule, "samples_per_epoch", None)
        if stage == "fit" and samples is not None:
            require_divisible(samples, self.hparams.updates, self.trainer.world_size)

    def require_precision(self, precision: str) -> None:
        """Refuse the precisions in which the updates would come out wrong."""
        refused = {
            "16-mixed": "scales the gradients before they are clipped, which would shrink every "
            "update",
            "16-true": "rounds the log-probs beyond the clip range",
            "bf16-true": "keeps the trained weights in 8 bits of precision, where a small step is "
            "lost",
        }
        if precision in refused:
            raise UserError(
                f"precision {precision} {refused[precision]}: use --trainer.precision bf16-mixed "
                "or 32-true"
            )

    def needs(self, stage: str) -> list[Need]:
        """List what earlier stages must have left for this one."""
        needs = [
            *self.reward.needs(),
            Need(self.hparams.judge, "the judge", "python run.py fit --config judge.yaml"),
        ]
        if not is_hub_id(self.hparams.pipeline):
            made_by = "python run.py fit --config sd.yaml"
            needs.append(Need(self.hparams.pipeline, "the fine-tuned pipeline", made_by))
        if stage in ("test", "predict") and self.hparams.policy:
            made_by = "python run.py fit --config ddpo.yaml"
            needs.append(Need(self.hparams.policy, "the trained policy", made_by))
        return needs

    def load_networks(self) -> None:
        """Load the pipeline, the reward's networks and the judge."""
        super().load_networks()
        self.load_scorers()
        self.divergence = MeanMetric()
        if self.hparams.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        if self.hparams.compile:
            self.unet.compile(backend=self.hparams.compile)

    def prepare_unet(self, unet: UNet2DConditionModel) -> None:
        """Make the policy: trainable for `fit`, the exported one for `test` and `predict`."""
        if self._trainer and self.trainer.state.fn in (TrainerFn.TESTING, TrainerFn.PREDICTING):
            if self.hparams.policy:
                load_policy(unet, Path(self.hparams.policy))
        elif self.hparams.train == "lora":
            add_lora(unet, self.hparams.lora_rank, seed=self.hparams.seed)
        else:
            unet.requires_grad_(True)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Count one batch of prompts; of the first, also how far the policy has come."""
        super().validation_step(batch, batch_idx)
        if batch_idx == 0:
            self.divergence.update(self.divergence_from_start(batch))

    def on_validation_epoch_end(self) -> None:
        """Log the scores, and the root of the divergence that they were bought with."""
        super().on_validation_epoch_end()
        self.log("val/sqrt_kl", self.divergence.compute().sqrt())
        self.divergence.reset()

    @torch.no_grad()
    def divergence_from_start(self, batch: dict[str, Any]) -> Tensor:
        """KL divergence from the policy before training, over whole trajectories, `(n,)`.

        Of this rank's among the first `sample_batch` images of a batch. Summed over the steps, and
        averaged over the latents' dimensions as the log-density is.
        """
        mine = slice(self.global_rank, self.hparams.sample_batch, self.trainer.world_size)
        prompts, index = batch["prompt"][mine], batch["index"][mine]
        total = torch.zeros(len(prompts), device=self.device)
        if not prompts:
            return total
        text, empty = self.embed(prompts), self.embed([""])[0]
        latents, transitions = self.walk(prompts, keys(self.hparams.seed, "validation", 0, index))
        walked = list(transitions)
        with self.before_training():
            for transition in walked:
                step = torch.full((len(prompts),), transition.step, device=self.device)
                reference = self.guided_noise(latents, step, text, empty)
                total += self.schedule.divergence(latents, transition.noise, reference, step)
                latents = transition.previous
        return total

    @contextmanager
    def before_training(self) -> Iterator[None]:
        """Let the U-Net compute what it did before training: without adapters, or as it was read.

        A full U-Net is read again, and is in memory twice as long as this lasts.
        """
        if self.hparams.train == "lora":
            with without_lora(self.unet):
                yield
            return
        trained = self.unet
        start = load_pipeline(self.hparams.pipeline, self.hparams.unet).unet
        self.unet = start.to(self.device)
        try:
            yield
        finally:
            self.unet = trained

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Optimize the adapters or the full U-Net, whichever is trained."""
        return self.optimizer(self.trained_parameters())

    def trained_parameters(self) -> list[nn.Parameter]:
        """List what the optimizer moves."""
        return [p for p in self.unet.parameters() if p.requires_grad]

    def trained_noise(self, latents: Tensor, step: Tensor, text: Tensor) -> Tensor:
        """Predict the noise as the policy that is trained does, with guidance or without.

        Args:
            latents: x_t, `(P, C, h, w)` float32.
            step: Index of the transition, `(P,)`.
            text: Prompt embeddings, `(P, L, D)`.
        """
        if self.hparams.guidance_in_training:
            return self.guided_noise(latents, step, text, self.embed([""])[0])
        timestep = self.schedule.timesteps[step]
        return self.unet(latents, timestep, text, return_dict=False)[0].float()

    @torch.no_grad()
    def reference_noise(self, latents: Tensor, step: Tensor, text: Tensor) -> Tensor:
        """Predict the noise as the policy did before training: the U-Net without its adapters."""
        with without_lora(self.unet):
            return self.trained_noise(latents, step, text)

    def export(self, folder: Path) -> None:
        """Write the policy: its adapters, or the whole pipeline if the full U-Net was trained."""
        if self.hparams.train == "lora":
            save_lora(self.unet, folder)
        else:
            super().export(folder)
