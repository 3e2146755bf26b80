"""The ratio in bf16, at the number of steps and the latents of Stable Diffusion v1.5."""

from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel

from rl4med_ddpo.foundation.errors import UserError
from rl4med_ddpo.lightning_modules import Brightness
from rl4med_ddpo.lightning_modules.policy_gradient.rollout import Pairs
from support.dermoscopy import PROMPTS
from support.tiny import prompts, tiny_ddpo
from support.trainers import quiet_trainer


@pytest.fixture(scope="module")
def large_latents(tmp_path_factory):
    """An untrained U-Net on 4 x 64 x 64 latents."""
    folder = tmp_path_factory.mktemp("large") / "unet"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        UNet2DConditionModel(
            sample_size=64, block_out_channels=(8, 8, 8, 16), layers_per_block=1,
            norm_num_groups=8, attention_head_dim=8, cross_attention_dim=16,
            down_block_types=(*["DownBlock2D"] * 3, "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", *["UpBlock2D"] * 3),
        ).save_pretrained(folder)  # fmt: skip
    return str(folder)


@pytest.mark.parametrize("old_log_probs", ["rollout", "training"])
def test_the_ratio_stays_within_the_clip_range(
    large_latents, tiny_pipeline, tiny_classifiers, tmp_path, old_log_probs
):
    policy = tiny_ddpo(
        tiny_pipeline, tiny_classifiers, unet=large_latents, reward=Brightness(), baseline="none",
        steps=50, updates=1, clip_range=1e-4, old_log_probs=old_log_probs, micro_batch=10,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.0),
    )  # fmt: skip
    policy.is_prepared, policy.micro_batch = True, 10
    trainer = quiet_trainer(tmp_path, max_epochs=1, precision="bf16-mixed")
    trainer.fit(policy, datamodule=prompts(1, number=2, prompts=[PROMPTS[0]]))
    (rollout,) = policy.rollouts
    assert rollout.latents.shape == (1, 51, 4, 64, 64)
    assert rollout.latents.dtype == rollout.log_probs.dtype == torch.float32
    assert trainer.callback_metrics["policy/ratio_deviation"] < 1e-5
    pairs = Pairs(torch.zeros(10, dtype=torch.long), torch.arange(40, 50), torch.ones(10))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        kept = policy.objective(rollout, pairs).ratio
        rounded = replace(rollout, latents=rollout.latents.bfloat16().float())
        off = policy.objective(rounded, pairs).ratio
    # in other batches than those of the run; and what latents in bf16 would do to it
    assert (kept - 1).abs().max() < 1e-4
    assert (off - 1).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("precision", "because"),
    [
        ("16-mixed", "scales the gradients before they are clipped"),
        ("16-true", "rounds log-probs and losses"),
        ("bf16-true", "keeps the trained weights in 8 bits"),
        ("64-true", "is computed by no GPU's fast units"),
    ],
)
def test_precisions_that_train_wrongly_are_refused(
    tiny_pipeline, tiny_classifiers, tmp_path, precision, because
):
    policy = tiny_ddpo(tiny_pipeline, tiny_classifiers)
    trainer = quiet_trainer(tmp_path)
    # on a CPU Lightning would put bf16 in the place of fp16
    trainer.precision_plugin.precision = precision
    with pytest.raises(UserError, match=rf"{precision} {because}.*precision bf16-mixed or 32-true"):
        trainer.fit(policy, datamodule=prompts())
