"""Time the real DDPO module on a pipeline folder, and print one JSON object.

    python -m benchmarks.tiny_pipeline runs/benchmarks/tiny
    python -m benchmarks.ddpo runs/benchmarks/tiny

Everything is what `rl4med-ddpo fit` runs; only clocks are added. Needed is a folder in the
diffusers layout, no classifier: the reward is the image's brightness, which every tool can earn.
"""

import argparse
import json
import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import lightning as L
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import Epoch, Stopwatch, now, peak_flops, peak_memory, summary
from benchmarks.options import PROMPT, ddpo_parser, parsed
from rl4med_ddpo.datamodules.prompts import ISICPromptDataModule
from rl4med_ddpo.lightning_modules import DDPO, Brightness, OnePassDDPO
from rl4med_ddpo.lightning_modules.prerequisites import Prerequisite

PRECISIONS: dict[str, tuple[Any, torch.dtype]] = {
    "32": ("32-true", torch.float32),
    "bf16": ("bf16-mixed", torch.bfloat16),
}
PARTS = ("text", "unet_forward", "backward", "vae", "reward", "rest")


class Timed(DDPO):
    """DDPO with clocks around its phases and parts; it asks for no judge and validates nothing."""

    def __init__(self, warmup: int, last: int, **options: Any) -> None:
        super().__init__(**options)
        self.warmup, self.last = warmup, last
        self.epochs: list[Epoch] = []
        self.phases, self.parts = Stopwatch(), Stopwatch()
        self.deviations: list[float] = []

    def prerequisites(self, stage: str) -> list[Prerequisite]:
        """Nothing: there is no judge."""
        return []

    def try_reward(self, device: torch.device) -> None:
        """Do without: no judge says how many attributes there are."""

    def make_scorer(self) -> nn.Module:
        """Do without a judge."""
        return nn.Identity()

    def configure_model(self) -> None:
        """Put a clock on each network."""
        super().configure_model()
        watch = self.parts
        self.model.embed = watch.timed("text", self.model.embed)
        self.model.decode = watch.timed("vae", self.model.decode)
        self.reward.forward = watch.timed("reward", self.reward.forward)
        self.model.predict_noise = watch.timed("unet_forward", self.model.predict_noise)
        self.manual_backward = watch.timed("backward", self.manual_backward)
        if isinstance(self, OnePassDDPO):
            self.sampler.after_step = watch.timed("backward", self.sampler.after_step)
        collect = self.sampler.collect

        def timed(*args: Any, **options: Any) -> Any:
            with self.phases.part("rollout"):
                return collect(*args, **options)

        self.sampler.collect = timed

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Time an epoch; one more after the last has its operations counted instead."""
        if self.current_epoch == self.last:
            return self.count(batch, batch_idx)
        if self.current_epoch == self.warmup:
            self.parts.spent.clear()
        before, self.phases = now(), Stopwatch()
        with self.parts.part("rest"):
            super().training_step(batch, batch_idx)
        logged, spent = self.trainer.callback_metrics, self.phases.spent
        reward = logged["reward/mean"].item()
        self.deviations.append(logged["policy/ratio_deviation"].item())
        self.epochs.append(Epoch(spent["rollout"], spent["update"], now() - before, reward))
        return None

    def count(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Count the operations of an epoch, with a counter that takes memory of its own."""
        clock = "wall" if self.device.type == "cuda" else "cpu"
        self.spent = {part: getattr(self.parts.spent[part], clock) for part in PARTS}
        self.memory = peak_memory(self.device.type)
        with FlopCounterMode(display=False) as counter:
            super().training_step(batch, batch_idx)
        self.flops = counter.get_total_flops()

    def update(self, *args: Any) -> Any:
        """Time an update."""
        with self.phases.part("update"):
            return super().update(*args)


class TimedOnePass(Timed, OnePassDDPO):
    """The same clocks around the other."""


def module(options: argparse.Namespace) -> Timed:
    """Return the module that the options describe."""
    return (TimedOnePass if options.one_pass else Timed)(
        options.warmup,
        options.epochs,
        pipeline=options.pipeline,
        reward=Brightness(),
        train=options.train,
        lora_rank=4,
        optimizer=lambda p: torch.optim.AdamW(p, lr=options.lr, weight_decay=1e-4),
        steps=options.steps,
        guidance=options.guidance,
        updates=options.updates,
        clip_range=options.clip_range,
        # what the other tools add to the standard deviation
        std_floor=1e-8,
        old_log_probs=options.old_log_probs,
        compile="inductor" if options.compile else None,
        gradient_checkpointing=options.gradient_checkpointing,
        sample_batch=options.sample_batch,
        micro_batch=options.micro_batch,
        seed=options.seed,
    )


@contextmanager
def quiet_trainer(options: argparse.Namespace) -> Iterator[L.Trainer]:
    """Yield a trainer that writes nothing."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as folder:
        yield L.Trainer(
            accelerator="gpu" if options.device == "cuda" else "cpu",
            devices=1,
            precision=PRECISIONS[options.precision][0],
            max_epochs=options.epochs + 1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            default_root_dir=folder,
        )


def figures(policy: Timed, options: argparse.Namespace) -> dict[str, Any]:
    """Sum up a run."""
    counted = policy.epochs[options.warmup :]
    found = summary(counted, options.samples, options.samples * policy.trained_steps)
    whole = found["epoch_s" if options.device == "cuda" else "epoch_cpu_s"]
    peak = peak_flops(options.device, PRECISIONS[options.precision][1])
    return {
        "tool": "rl4med-ddpo",
        "versions": {p: version(p) for p in ("torch", "diffusers", "peft", "lightning")},
        "options": vars(options),
        **found,
        **policy.memory,
        "share_of_peak": round(policy.flops / whole / peak, 4),
        "peak_gflops": round(peak / 1e9, 1),
        "gflop_an_epoch": round(policy.flops / 1e9, 1),
        "parts": {part: round(spent / len(counted), 3) for part, spent in policy.spent.items()},
        "ratio_deviation": max(policy.deviations),
        "reward_curve": [round(epoch.reward, 6) for epoch in policy.epochs],
    }


def main() -> None:
    """Run and print."""
    parser = ddpo_parser("DDPO of this project, timed")
    add = parser.add_argument
    add("--one-pass", action="store_true", help="OnePassDDPO; wants --updates 1 and LoRA")
    add("--compile", action="store_true", help="compile the U-Net")
    add("--gradient-checkpointing", action="store_true", help="keep few activations")
    add("--old-log-probs", choices=("rollout", "training"), default="rollout", help="of DDPO")
    options = parsed(parser)
    policy = module(options)
    data = ISICPromptDataModule(
        prompts=[PROMPT], samples_per_epoch=options.samples, validation_samples_per_prompt=0
    )
    with quiet_trainer(options) as trainer:
        trainer.fit(policy, datamodule=data)
    print(json.dumps(figures(policy, options)))


if __name__ == "__main__":
    main()
