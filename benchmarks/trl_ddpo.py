"""The same DDPO run by TRL 0.23.0, the last release that has it, in an environment of its own.

    uv venv runs/benchmarks/trl --python 3.11
    uv pip install --python runs/benchmarks/trl/bin/python trl==0.23.0 torch==2.14.1 \
        diffusers==0.35.2 transformers==4.57.1 accelerate==1.10.1 peft==0.17.1
    runs/benchmarks/trl/bin/python -m benchmarks.trl_ddpo PIPELINE_DIR

The trainer is TRL's, unedited. It standardises the rewards over the whole batch, which is what
`baseline: group` does with a single prompt, as here. With `--same-draws` it is given the noise, the
first adapters and the order of the samples that `benchmarks.ddpo` has for the same seed, so that
the two runs differ in nothing but the code.
"""

import argparse
import json
import runpy
from pathlib import Path
from typing import Any

import diffusers
import torch
import trl
from accelerate import PartialState
from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion
from torch import Tensor, nn
from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline
from trl.core import randn_tensor
from trl.models import modeling_sd_base

from benchmarks.measure import Epoch, Stopwatch, now, peak_memory, summary
from benchmarks.options import PROMPT, ddpo_parser, parsed


class TimedTrainer(DDPOTrainer):
    """TRL's trainer with clocks around its phases."""

    watch: Stopwatch
    noise: "SampleNoise | None" = None

    def step(self, *args: Any) -> int:
        """Take an epoch; with our draws, its updates take the samples in our order."""
        if self.noise:
            shuffle = torch.randperm

            def our_order(samples: int, **_: Any) -> Tensor:
                # TRL shuffles the samples first, and then each one's steps, of which all are taken
                torch.randperm = shuffle
                return self.noise.order(samples)

            torch.randperm = our_order
        return super().step(*args)

    def _generate_samples(self, iterations: int, batch_size: int) -> Any:
        samples, images = [], []
        with self.watch.part("rollout"):
            for first in range(0, iterations * batch_size, batch_size):
                if self.noise:
                    self.noise.of(range(first, first + batch_size))
                drawn, shown = super()._generate_samples(1, batch_size)
                samples += drawn
                images += shown
        return samples, images

    def _train_batched_samples(self, *args: Any, **options: Any) -> Any:
        with self.watch.part("update"):
            return super()._train_batched_samples(*args, **options)


class SampleNoise:
    """A generator for each sample of an epoch, seeded as this project's are."""

    def __init__(self, seed: int) -> None:
        # by its path: the package wants what this environment has not
        file = Path(__file__).parents[1] / "foundation" / "randomness.py"
        self.randomness, self.seed, self.epoch = runpy.run_path(str(file)), seed, 0
        self.generators: list[torch.Generator] = []
        for module in (pipeline_stable_diffusion, modeling_sd_base):
            module.randn_tensor = self.draw

    def of(self, samples: range) -> None:
        """Begin a batch."""
        keys = self.randomness["keys"](self.seed, "rollout", self.epoch, torch.tensor(samples))
        self.generators = [self.randomness["generator"](key) for key in keys.tolist()]

    def order(self, samples: int) -> Tensor:
        """Return the order in which an epoch's samples are trained."""
        key = self.randomness["key"](self.seed, "order", self.epoch)
        return torch.randperm(samples, generator=self.randomness["generator"](key))

    def draw(self, shape: tuple, generator: Any = None, **options: Any) -> Tensor:
        """Draw for a batch, `(B, ...)`, each sample from its own generator."""
        return randn_tensor(shape, generator=self.generators, **options)


class Seeded(DefaultDDPOStableDiffusionPipeline):
    """TRL's pipeline with the first adapters of `add_lora`."""

    seed = 0

    def get_trainable_layers(self) -> nn.Module:
        """Add the adapters."""
        torch.manual_seed(self.seed)
        return super().get_trainable_layers()


def config(options: argparse.Namespace) -> DDPOConfig:
    """Return the settings that the options describe."""
    return DDPOConfig(
        seed=options.seed, num_epochs=options.epochs, save_freq=10**9, log_with=None,
        accelerator_kwargs={"cpu": options.device == "cpu"},
        mixed_precision="no" if options.precision == "32" else "bf16",
        sample_num_steps=options.steps, sample_eta=1.0, sample_guidance_scale=options.guidance,
        sample_batch_size=options.sample_batch,
        sample_num_batches_per_epoch=options.samples // options.sample_batch,
        train_batch_size=options.micro_batch, train_learning_rate=options.lr,
        train_clip_range=options.clip_range,
        train_gradient_accumulation_steps=(
            options.samples // options.updates // options.micro_batch
        ),
    )  # fmt: skip


def main() -> None:
    """Run and print the figures as one JSON object."""
    parser = ddpo_parser("DDPO of TRL 0.23.0, timed")
    parser.add_argument("--same-draws", action="store_true", help="noise, adapters, order of ours")
    options = parsed(parser)
    PartialState(cpu=options.device == "cpu")
    earned: list[float] = []

    def reward(images: torch.Tensor, prompts: Any, metadata: Any) -> tuple[torch.Tensor, dict]:
        values = images.float().mean(dim=(1, 2, 3))
        earned.extend(values.tolist())
        return values, {}

    kind = Seeded if options.same_draws else DefaultDDPOStableDiffusionPipeline
    pipeline = kind(options.pipeline, use_lora=options.train == "lora")
    pipeline.seed = options.seed
    trainer = TimedTrainer(config(options), reward, lambda: (PROMPT, {}), pipeline)
    trainer.noise = SampleNoise(options.seed) if options.same_draws else None
    trainer.sd_pipeline.set_progress_bar_config(disable=True)
    epochs, global_step = [], 0
    for epoch in range(options.epochs):
        trainer.watch = Stopwatch()
        earned.clear()
        if trainer.noise:
            trainer.noise.epoch = epoch
        start = now()
        global_step = trainer.step(epoch, global_step)
        spent = trainer.watch.spent
        epochs.append(
            Epoch(spent["rollout"], spent["update"], now() - start, sum(earned) / len(earned))
        )
    pairs = options.samples * options.steps
    figures = {
        "tool": f"trl {trl.__version__}",
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
        "options": vars(options),
        **summary(epochs[options.warmup :], options.samples, pairs),
        **peak_memory(options.device),
        "reward_curve": [round(epoch.reward, 6) for epoch in epochs],
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
