"""The sampling half of Algorithm 1: draw images from the policy and score them."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rl4med_ddpo.datamodules.attributes import prompt_id
from rl4med_ddpo.foundation.randomness import keys
from rl4med_ddpo.lightning_modules.diffusion.ddim import Transition
from rl4med_ddpo.lightning_modules.guarded_policy import GuardedPolicy
from rl4med_ddpo.lightning_modules.policy_gradient.non_finite import Fault
from rl4med_ddpo.lightning_modules.policy_gradient.rollout import (
    Rollout,
    empty_rollout,
    require_divisible,
    sample_order,
)
from rl4med_ddpo.lightning_modules.rewards.base import joined, shares
from rl4med_ddpo.lightning_modules.rewards.diversity import group_diversity, layout


class SampledPolicy(GuardedPolicy):
    """A policy that samples its training data: M images an epoch, shared out over the ranks."""

    def order(self, samples: int) -> Tensor:
        """Order the epoch's global sample indices; position p is rank p mod W's."""
        require_divisible(samples, self.hparams.updates, self.trainer.world_size)
        return sample_order(samples, self.hparams.seed, self.current_epoch)

    def groups(self, batch: dict[str, Any], order: Tensor) -> Tensor:
        """Return the prompt id of each sample, `(M,)` in sample order."""
        ids = [prompt_id(batch["prompt"][i]) for i in order.tolist()]
        return torch.tensor(ids, device=self.device)

    @property
    def rollout_batch(self) -> int:
        """Images sampled at a time."""
        return self.hparams.sample_batch

    @torch.no_grad()
    def rollout(self, batch: dict[str, Any], order: Tensor) -> Rollout:
        """Draw this rank's samples with their intermediate states (Algorithm 1, line 4).

        Each batch is scored when it is drawn, so that no more images are in memory than its own.
        """
        mine = order[self.global_rank :: self.trainer.world_size]
        rollout = empty_rollout(
            batch["index"][mine],
            [batch["prompt"][i] for i in mine.tolist()],
            batch["condition"][mine].to(self.device),
            (len(self.schedule) + 1, *self.latent_shape),
            on_host=self.hparams.trajectory == "host",
        )
        scored, looks = [], []
        for first in range(0, len(mine), self.rollout_batch):
            rows = slice(first, first + self.rollout_batch)
            images = self.decode(self.follow(rollout, rows))
            scored.append(self.reward(images, rollout.conditions[rows]))
            looks.append(layout(images))
        return replace(rollout, scored=joined(scored), looks=torch.cat(looks))

    def follow(self, rollout: Rollout, rows: slice) -> Tensor:
        """Walk with some of this rank's samples from x_T to x_0, record all of it, return x_0."""
        noise_keys = keys(self.hparams.seed, "rollout", self.current_epoch, rollout.index[rows])
        latents, transitions = self.walk(rollout.prompts[rows], noise_keys)
        return rollout.record(rows, latents, self.reported(transitions, rollout, rows))

    def reported(
        self, transitions: Iterator[Transition], rollout: Rollout, rows: slice
    ) -> Iterator[Transition]:
        """Pass a batch's transitions on, telling after each how far the whole rollout is."""
        done, total = rows.start * len(self.schedule), rollout.log_probs.numel()
        for transition in transitions:
            done += len(transition.log_prob)
            self.report_progress("rollout", done, total)
            yield transition

    @torch.no_grad()
    def rewards(self, rollout: Rollout, groups: Tensor) -> Tensor:
        """Gather the rewards of all ranks (Algorithm 1, line 5), `(M,)` in sample order."""
        mine = rollout.scored
        self.report_progress("reward", 1, 1)
        rewards = self.gather_in_order(mine.value)
        terms = {name: self.gather_in_order(term) for name, term in mine.terms.items()}
        if self.hparams.diversity_weight:
            looks = self.gather_in_order(rollout.looks.nan_to_num())
            terms["diversity"] = self.hparams.diversity_weight * group_diversity(looks, groups)
            rewards = rewards + terms["diversity"]
        for name, part in mine.parts.items():
            self.log(f"reward/{name}", self.gather_in_order(part).mean(), batch_size=1)
        for name, share in shares(terms).items():
            self.log(f"reward_share/{name}", share, batch_size=1)
        finite = rewards[rewards.isfinite()]
        self.log("reward/mean", finite.mean(), prog_bar=True, batch_size=1)
        self.log("reward/std", finite.std(correction=0), batch_size=1)
        return rewards

    def gather_in_order(self, values: Tensor) -> Tensor:
        """Interleave the ranks' `(n, ...)` into `(M, ...)`: position p is rank p mod W's."""
        ranks = self.all_gather(values).reshape(self.trainer.world_size, *values.shape)
        return ranks.transpose(0, 1).flatten(0, 1)

    def are_finite(self, rollout: Rollout, rewards: Tensor) -> bool:
        """Tell whether there is a rollout to learn from; if not, say whose samples spoil it."""
        own = rewards[self.global_rank :: self.trainer.world_size]
        values = {"density": rollout.log_probs.sum(dim=1), "reward": own}
        faults = [
            Fault(what, value, rollout.prompts[row], int(rollout.index[row]))
            for what, column in values.items()
            for row, value in enumerate(column.tolist())
            if not math.isfinite(value)
        ]
        if not self.all_gather(torch.tensor(len(faults), device=self.device)).any():
            return True
        self.skip(faults)
        return False
