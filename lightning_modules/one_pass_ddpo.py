"""DDPO that takes its gradients while it samples: one forward pass an action, not two."""

from typing import Any

import torch
from torch import Tensor

from rl4med_ddpo.foundation.errors import UserError
from rl4med_ddpo.lightning_modules.ddpo import DDPO
from rl4med_ddpo.lightning_modules.diffusion.latent_diffusion import (
    DDIMSchedule,
    LatentDiffusion,
    Transition,
)
from rl4med_ddpo.lightning_modules.diffusion.lora import adapter_layers
from rl4med_ddpo.lightning_modules.policy_gradient.epoch import Epoch
from rl4med_ddpo.lightning_modules.policy_gradient.objective import PolicyLoss, clipped_policy_loss
from rl4med_ddpo.lightning_modules.policy_gradient.per_sample import per_sample_gradients
from rl4med_ddpo.lightning_modules.policy_gradient.rollout import (
    Pairs,
    Rollout,
    RolloutSampler,
    chosen_steps,
)
from rl4med_ddpo.lightning_modules.rewards.base import Reward


class OnePassDDPO(DDPO):
    """DDPO with one update a rollout and one forward pass an action: gradients come with sampling.

    In the only update the policy is still the one that sampled, so every ratio is 1 and the
    gradient of Eq. 2 is the mean of -A grad log p. The forward pass that drew an action is then
    followed at once by a backward pass, which collects each sample's gradient for the adapters;
    when the rewards are known, the advantages weight them. Equal to DDPO's update up to the order
    of float sums. Samples that turn out to have no advantage have cost a backward pass, which DDPO
    would have saved: where most groups are tied, DDPO may be the faster one.

    Wants `train: lora`, one update and one inner epoch, guidance in training as in sampling, no
    penalty on the divergence and no `compile`. A batch of samples is at most `micro_batch`.
    """

    sampler: "OnePassSampler"

    def __init__(self, *args: Any, updates: int = 1, **options: Any) -> None:
        super().__init__(*args, updates=updates, **options)
        wanted = {"train": "lora", "updates": 1, "inner_epochs": 1, "kl_weight": 0.0}
        # compiled code would be rebuilt for each batch, whose collectors are its own
        wanted |= {"guidance_in_training": True, "old_log_probs": "rollout", "compile": None}
        wanted |= {"trust_region": "clip"}
        wrong = [f"{k}={self.hparams[k]!r}" for k, v in wanted.items() if self.hparams[k] != v]
        if wrong:
            allowed = ", ".join(f"{name}: {value}" for name, value in wanted.items())
            raise UserError(
                f"OnePassDDPO cannot have {', '.join(wrong)}: its gradients are those of the "
                f"policy that samples. It wants {allowed}; for others take class_path: DDPO"
            )

    def make_sampler(self) -> RolloutSampler:
        """Return a sampler that takes gradients on the way."""
        p = self.hparams
        return OnePassSampler(
            self.model, self.schedule, self.reward, p.seed, p.sample_batch,
            p.trajectory == "host", self.window_of_steps, self.trained_steps,
            self.objective.weights,
        )  # fmt: skip

    def epoch_of(self, samples: int) -> Epoch:
        """Work out the sizes of an epoch: each image of a batch keeps its activations."""
        epoch = super().epoch_of(samples)
        self.sampler.batch = min(self.hparams.sample_batch, epoch.micro_batch)
        batch = min(self.sampler.batch, epoch.samples_per_rank)
        return epoch._replace(sample_batch=batch, one_pass=True)

    def accumulate(self, rollout: Rollout, passes: list[Pairs]) -> PolicyLoss:
        """Weight the collected gradients by the advantages, and hand them to autograd in one pass.

        The surrogate, a sum of weights times constants, has exactly these gradients.
        """
        advantages = torch.zeros(len(rollout.index))
        for pairs in passes:
            advantages[pairs.row] = pairs.advantage
        share = -advantages.to(self.device) / rollout.log_probs[:, : self.trained_steps].numel()
        surrogate = share.new_zeros(())
        layers = adapter_layers(self.model.unet)
        for layer, *parts in zip(layers, *self.sampler.taken(), strict=True):
            gradient = torch.einsum("b,boi->oi", share, torch.cat(parts))
            surrogate = surrogate + (layer.weight * gradient).sum()
        self.manual_backward(surrogate)
        log_probs = advantages.new_zeros(len(advantages))
        return clipped_policy_loss(log_probs, log_probs, advantages, self.clip_range)


class OnePassSampler(RolloutSampler):
    """Follows each step that is trained by a backward pass for every sample's own gradient.

    Args:
        model: The policy, with adapters.
        schedule: See `RolloutSampler`.
        reward: Likewise.
        seed: Likewise.
        batch: Likewise.
        on_host: Likewise.
        window: First step that may be trained, and the first after.
        trained: Steps of each sample that are trained.
        step_weights: Of each step in the loss, `(T,)`.
    """

    def __init__(
        self,
        model: LatentDiffusion,
        schedule: DDIMSchedule,
        reward: Reward,
        seed: int,
        batch: int,
        on_host: bool,
        window: tuple[int, int],
        trained: int,
        step_weights: Tensor,
    ) -> None:
        super().__init__(model, schedule, reward, seed, batch, on_host)
        self.window, self.trained, self.step_weights = window, trained, step_weights
        self.weights = torch.zeros(0, 0)
        self.gradients: list[list[Tensor]] = []

    def sample_batch(self, rollout: Rollout, rows: slice) -> Tensor:
        """Sample some rows, and collect the gradient of each one's log-probs."""
        if rows.start == 0:
            self.gradients.clear()
        index = rollout.index[rows]
        steps = chosen_steps(index, self.window, self.trained, (self.seed, self.epoch, 0))
        chosen = torch.zeros(len(index), self.schedule.steps).scatter(1, steps, 1.0)
        self.weights = chosen * self.step_weights
        layers = adapter_layers(self.model.unet)
        with torch.enable_grad(), per_sample_gradients(layers, len(index)) as collectors:
            final = super().sample_batch(rollout, rows)
        self.gradients.append([c.grad for c in collectors if c.grad is not None])
        return final

    def after_step(self, transition: Transition, rows: slice) -> None:
        """Add the gradient of the trained samples' log-probs; no process waits for others."""
        weights = self.weights[:, transition.step]
        if weights.any():
            (transition.log_prob * weights.to(transition.log_prob.device)).sum().backward()

    def taken(self) -> list[list[Tensor]]:
        """Hand over the gradients of the rollout: for each batch, each adapter's `(B, out, in)`."""
        gradients, self.gradients = self.gradients, []
        return gradients
