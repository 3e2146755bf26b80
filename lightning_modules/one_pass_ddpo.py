"""DDPO that takes its gradients while it samples: one forward pass an action, not two."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rl4med_ddpo.callbacks.preflight import Epoch
from rl4med_ddpo.foundation.errors import UserError
from rl4med_ddpo.lightning_modules.ddpo import DDPO
from rl4med_ddpo.lightning_modules.diffusion.ddim import Transition
from rl4med_ddpo.lightning_modules.diffusion.lora import adapter_layers
from rl4med_ddpo.lightning_modules.policy_gradient.loss import Means, clipped_policy_loss
from rl4med_ddpo.lightning_modules.policy_gradient.per_sample import per_sample_gradients
from rl4med_ddpo.lightning_modules.policy_gradient.rollout import Pairs, Rollout, chosen_steps


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

    def __init__(self, *args: Any, updates: int = 1, **options: Any) -> None:
        super().__init__(*args, updates=updates, **options)
        wanted = {"train": "lora", "updates": 1, "inner_epochs": 1, "kl_weight": 0.0}
        # compiled code would be made anew for each batch, whose collectors are its own
        wanted |= {"guidance_in_training": True, "old_log_probs": "rollout", "compile": None}
        wrong = [f"{k}={self.hparams[k]!r}" for k, v in wanted.items() if self.hparams[k] != v]
        if wrong:
            allowed = ", ".join(f"{name}: {value}" for name, value in wanted.items())
            raise UserError(
                f"OnePassDDPO cannot have {', '.join(wrong)}: its gradients are those of the "
                f"policy that samples. It wants {allowed}; for others take class_path: DDPO"
            )

    @property
    def rollout_batch(self) -> int:
        """Images sampled at a time: each keeps its activations for a backward pass."""
        return min(self.hparams.sample_batch, self.micro_batch)

    def measured(self, epoch: Epoch) -> tuple[float, float]:
        """Time a denoising step of a batch; those that are trained hold all of the training."""
        step, training = super().measured(epoch)
        trained = epoch.trained_steps / epoch.steps
        both = training * epoch.sample_batch / epoch.micro_batch
        return trained * both + (1 - trained) * step, 0.0

    def rollout(self, batch: dict[str, Any], order: Tensor) -> Rollout:
        """Draw this rank's samples and collect the gradient of each one's log-probs."""
        self.scores: list[list[Tensor]] = []
        return super().rollout(batch, order)

    def follow(self, rollout: Rollout, rows: slice) -> Tensor:
        """Walk with some samples, with a backward pass after each step that is trained."""
        index = rollout.index[rows]
        seeds = (self.hparams.seed, self.current_epoch, 0)
        steps = chosen_steps(index, self.window_of_steps, self.trained_steps, seeds)
        self.trained = torch.zeros(len(index), len(self.schedule)).scatter(1, steps, 1.0)
        layers = adapter_layers(self.unet)
        with torch.enable_grad(), per_sample_gradients(layers, len(index)) as collectors:
            final = super().follow(rollout, rows)
        self.scores.append([collector.grad for collector in collectors])
        return final

    def reported(
        self, transitions: Iterator[Transition], rollout: Rollout, rows: slice
    ) -> Iterator[Transition]:
        """Pass a batch's transitions on, each after the backward pass of its trained samples."""
        for transition in super().reported(transitions, rollout, rows):
            weights = self.trained[:, transition.step]
            if weights.any():
                self.backward_of((transition.log_prob * weights.to(self.device)).sum())
            yield transition._replace(log_prob=transition.log_prob.detach())

    def backward_of(self, log_prob: Tensor) -> None:
        """Add the gradient of a sum of log-probs to the collectors; no process waits for others."""
        log_prob.backward()

    def accumulate(self, rollout: Rollout, passes: list[Pairs]) -> Means:
        """Weight the collected gradients by the advantages, and hand them to autograd in one pass.

        The surrogate, a sum of weights times constants, has exactly these gradients.
        """
        advantages, means = torch.zeros(len(rollout.index)), Means()
        for pairs in passes:
            advantages[pairs.row] = pairs.advantage
        share = -advantages.to(self.device) / rollout.log_probs[:, : self.trained_steps].numel()
        surrogate = share.new_zeros(())
        for layer, *parts in zip(adapter_layers(self.unet), *self.scores, strict=True):
            gradient = torch.einsum("b,boi->oi", share, torch.cat(parts))
            surrogate = surrogate + (layer.weight * gradient).sum()
        self.scores.clear()
        self.manual_backward(surrogate)
        log_probs = advantages.new_zeros(len(advantages))
        means.add(clipped_policy_loss(log_probs, log_probs, advantages, self.clip_range))
        return means
