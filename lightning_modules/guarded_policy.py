"""What stands around the training of a policy: the preflight, and what is done with NaN."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from rl4med_ddpo.callbacks.preflight import Epoch, seconds, table
from rl4med_ddpo.foundation.errors import UserError
from rl4med_ddpo.foundation.randomness import keys
from rl4med_ddpo.lightning_modules.policy import Policy
from rl4med_ddpo.lightning_modules.policy_gradient.loss import PolicyLoss
from rl4med_ddpo.lightning_modules.policy_gradient.micro_batch import (
    free_memory,
    largest_micro_batch,
)
from rl4med_ddpo.lightning_modules.policy_gradient.non_finite import (
    FOLDER,
    Fault,
    SkippedUpdates,
    write_faults,
)
from rl4med_ddpo.lightning_modules.policy_gradient.rollout import Pairs, Rollout, empty_rollout

DRAWN_BY = (
    *("seed", "pipeline", "unet", "steps", "eta"),
    *("guidance", "sample_batch", "train", "lora_rank"),
)


class GuardedPolicy(Policy):
    """A policy that counts before it trains, and skips updates that are not finite.

    Subclasses train by `policy_loss`, have `trained_steps` and `rollout_batch`, and take what an
    epoch's sizes depend on as hyperparameters.
    """

    def __init__(self) -> None:
        super().__init__()
        self.skipped = SkippedUpdates()
        # 0 until it is found, or taken from the checkpoint of a run that found it
        self.micro_batch = 0
        self.is_prepared = False

    def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Before the first rollout, find the micro-batch and say what an epoch will do."""
        if self.is_prepared:
            return
        self.is_prepared = True
        with self.trainer.precision_plugin.forward_context():
            epoch = self.sized(len(batch["prompt"]))
            step, training = self.measured(epoch)
        rank_zero_info(table(epoch, step, training))

    def sized(self, samples: int) -> Epoch:
        """Work out the sizes of an epoch; finds the micro-batch if that is asked for."""
        p, ranks = self.hparams, self.trainer.world_size
        pairs = samples // ranks // p.updates * self.trained_steps
        if not self.micro_batch:
            self.micro_batch = (
                self.fitting_micro_batch(pairs) if p.micro_batch == "auto" else p.micro_batch
            )
        elements = torch.Size(self.latent_shape).numel()
        return Epoch(
            samples=samples,
            ranks=ranks,
            sample_batch=min(self.rollout_batch, samples // ranks),
            steps=p.steps,
            trained_steps=self.trained_steps,
            micro_batch=self.micro_batch,
            updates=p.updates,
            inner_epochs=p.inner_epochs,
            latent_bytes=(p.steps + 1) * elements * 4,
            on_host=p.trajectory == "host",
        )

    def fitting_micro_batch(self, pairs: int) -> int:
        """Find the largest micro-batch that fits into memory on every rank."""
        rollout = self.blank_rollout()
        fitting = largest_micro_batch(
            lambda n: self.policy_loss(rollout, blank_pairs(n, self.hparams.steps)).loss.sum(),
            pairs,
            free_memory(self.device),
        )
        return int(self.all_gather(torch.tensor(fitting, device=self.device)).min())

    def measured(self, epoch: Epoch) -> tuple[float, float]:
        """Time one denoising step of a batch and one training pass; nothing is changed by them."""
        rollout, n = self.blank_rollout(), epoch.sample_batch
        state, _ = rollout.transitions(*blank_pairs(n, epoch.steps)[:2])
        step = torch.zeros(n, dtype=torch.long, device=self.device)
        pairs = blank_pairs(epoch.micro_batch, epoch.steps)

        def sample() -> None:
            with torch.no_grad():
                self.guided_noise(state, step, self.embed([""] * n), self.embed([""])[0])

        def train() -> None:
            loss = self.policy_loss(rollout, pairs).loss.sum()
            torch.autograd.grad(loss, self.trained_parameters())

        return seconds(sample, self.device), seconds(train, self.device)

    def blank_rollout(self) -> Rollout:
        """Return one sample of zeros, to try on what a pass costs."""
        rollout = empty_rollout(
            torch.zeros(1, dtype=torch.long),
            [""],
            torch.zeros(1, 6, device=self.device),
            (self.hparams.steps + 1, *self.latent_shape),
            on_host=False,
        )
        rollout.latents.zero_()
        rollout.log_probs.zero_()
        return rollout

    def faults_of(self, rollout: Rollout, passes: list[Pairs]) -> list[Fault]:
        """Find this rank's pairs whose loss or gradient is not finite; no other rank is asked."""
        found = []
        for pairs in passes:
            if self.is_finite(rollout, pairs):
                continue
            for row, step, advantage in zip(*(c.split(1) for c in pairs), strict=True):
                single = Pairs(row, step, advantage)
                if self.is_finite(rollout, single):
                    continue
                loss = self.policy_loss(rollout, single).loss.item()
                sample = rollout.prompts[row], int(rollout.index[row])
                what = "gradient" if torch.tensor(loss).isfinite() else "loss"
                value = loss if what == "loss" else float("nan")
                found.append(Fault(what, value, *sample, int(step)))
        return found

    def is_finite(self, rollout: Rollout, pairs: Pairs) -> bool:
        """Tell whether the loss and the gradient of some pairs are finite."""
        loss = self.policy_loss(rollout, pairs).loss.sum()
        gradients = torch.autograd.grad(loss, self.trained_parameters(), allow_unused=True)
        return all(bool(x.isfinite().all()) for x in (loss, *gradients) if x is not None)

    def policy_loss(self, rollout: Rollout, pairs: Pairs) -> PolicyLoss:
        """Evaluate the loss of some pairs."""
        raise NotImplementedError

    def skip(self, own: list[Fault]) -> None:
        """Skip an update on all ranks: write down whose samples are at fault, and count.

        Args:
            own: This rank's.
        """
        everyone = self.gathered(own)
        name = f"epoch_{self.current_epoch}_{self.skipped.total + 1}.pt"
        file = Path(self.trainer.default_root_dir) / FOLDER / name
        if self.trainer.is_global_zero:
            draw = {name: self.hparams[name] for name in DRAWN_BY} | {"epoch": self.current_epoch}
            write_faults(file, everyone, draw, self.state_dict())
        self.skipped.add(everyone, file, self.hparams.max_skipped)

    def gathered(self, own: list[Fault]) -> list[Fault]:
        """Return all ranks' faults."""
        ranks: list[list[Fault]] = [own] * self.trainer.world_size
        if self.trainer.world_size > 1:
            torch.distributed.all_gather_object(ranks, own)
        return [fault for faults in ranks for fault in faults]


def blank_pairs(n: int, steps: int) -> Pairs:
    """Return n pairs of the one sample of a blank rollout."""
    row = torch.zeros(n, dtype=torch.long)
    return Pairs(row, torch.arange(n) % steps, torch.ones(n))


def draw_again(policy: Policy, file: Path) -> Tensor:
    """Draw the samples that a fault file names, with the weights that drew them.

    Args:
        policy: Configured with the settings that the file holds; its weights are replaced.
        file: What a skipped update left.

    Returns:
        For each of the F faults the states x_T to x_0, `(F, T + 1, C, h, w)`.
    """
    kept = torch.load(file, weights_only=True)
    names = [name for name in DRAWN_BY if name != "pipeline"]
    other = [f"{n}={policy.hparams[n]!r}" for n in names if policy.hparams[n] != kept[n]]
    if other:
        wanted = ", ".join(f"{name}={kept[name]!r}" for name in names)
        raise UserError(f"{file} was drawn with {wanted}; the policy given has {', '.join(other)}")
    policy.load_state_dict(kept["weights"])
    faults = kept["faults"]
    index = torch.tensor([fault["index"] for fault in faults])
    noise_keys = keys(kept["seed"], "rollout", kept["epoch"], index)
    with torch.no_grad():
        latents, transitions = policy.walk([fault["prompt"] for fault in faults], noise_keys)
        return torch.stack([latents, *(step.previous for step in transitions)], dim=1)
