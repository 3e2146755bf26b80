"""The same DDPO run by TRL 0.23.0, the last release that has it, in an environment of its own.

    uv venv runs/benchmarks/trl --python 3.11
    uv pip install --python runs/benchmarks/trl/bin/python trl==0.23.0 torch==2.14.1 \
        diffusers==0.35.2 transformers==4.57.1 accelerate==1.10.1 peft==0.17.1
    runs/benchmarks/trl/bin/python -m benchmarks.trl_ddpo PIPELINE_DIR

The trainer is TRL's, unedited. It standardises the rewards over the whole batch, which is what
`baseline: group` does with a single prompt, as here.
"""

import json
from typing import Any

import diffusers
import torch
import trl
from accelerate import PartialState
from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline

from benchmarks.measure import Epoch, Stopwatch, now, peak_memory, summary
from benchmarks.options import PROMPT, ddpo_parser, parsed


class TimedTrainer(DDPOTrainer):
    """TRL's trainer with clocks around its phases."""

    watch: Stopwatch
    rewards: list[float]

    def _generate_samples(self, *args: Any, **options: Any) -> Any:
        with self.watch.part("rollout"):
            return super()._generate_samples(*args, **options)

    def _train_batched_samples(self, *args: Any, **options: Any) -> Any:
        with self.watch.part("update"):
            return super()._train_batched_samples(*args, **options)


def main() -> None:
    """Run and print the figures as one JSON object."""
    options = parsed(ddpo_parser("DDPO of TRL 0.23.0, timed"))
    PartialState(cpu=options.device == "cpu")
    config = DDPOConfig(
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
    earned: list[float] = []

    def reward(images: torch.Tensor, prompts: Any, metadata: Any) -> tuple[torch.Tensor, dict]:
        values = images.float().mean(dim=(1, 2, 3))
        earned.extend(values.tolist())
        return values, {}

    trainer = TimedTrainer(
        config,
        reward,
        lambda: (PROMPT, {}),
        DefaultDDPOStableDiffusionPipeline(options.pipeline, use_lora=options.train == "lora"),
    )
    trainer.sd_pipeline.set_progress_bar_config(disable=True)
    epochs, global_step = [], 0
    for epoch in range(options.epochs):
        trainer.watch = Stopwatch()
        earned.clear()
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
