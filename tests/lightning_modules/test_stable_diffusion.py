from functools import partial

import lightning as L
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import distance, flat, quiet_trainer, state_of
from torch.utils.data import DataLoader

from datamodules.attributes import CONDITIONS, PROMPTS
from datamodules.errors import UserError
from datamodules.isic import ISICDataModule
from lightning_modules import StableDiffusion
from lightning_modules.pipelines import load_pipeline
from lightning_modules.randomness import generator, key


class Captioned(L.LightningDataModule):
    """Sixteen images, as bright as the row of their prompt says, in the same order every epoch."""

    def __init__(self, augment=False):
        super().__init__()
        self.augment = augment
        rows = torch.arange(16) * 2
        noise = torch.rand(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        images = (rows.view(-1, 1, 1, 1) / 32 + noise) / 2
        self.items = [
            {
                "image": image,
                "prompt": PROMPTS[row],
                "condition": CONDITIONS[row],
                "id": f"image_{row}",
            }
            for image, row in zip(images, rows.tolist(), strict=True)
        ]

    def train_dataloader(self):
        return DataLoader(self.items, batch_size=4)

    def val_dataloader(self):
        return DataLoader(self.items, batch_size=8)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-3)


def module(pipeline, **options):
    defaults = {"pipeline": pipeline, "optimizer": adamw, "steps": 4, "guidance": 3.0}
    return StableDiffusion(**(defaults | options))


def fit(model, folder, epochs=2, data=None, ckpt_path=None, **options):
    trainer = quiet_trainer(folder, max_epochs=epochs, **options)
    trainer.fit(model, datamodule=data or Captioned(), ckpt_path=ckpt_path)
    return trainer


def unet_of(pipeline):
    return {f"unet.{k}": v for k, v in load_pipeline(pipeline).unet.state_dict().items()}


def test_the_loss_falls_and_only_the_unet_changes(tiny_pipeline, tmp_path):
    model = module(tiny_pipeline)
    first = fit(model, tmp_path, epochs=1, num_sanity_val_steps=2).callback_metrics["val/loss"]
    again = module(tiny_pipeline)
    last = fit(again, tmp_path, epochs=10).callback_metrics["val/loss"]
    assert last < 0.8 * first
    assert state_of(again).keys() == unet_of(tiny_pipeline).keys()
    changed = [
        k for k, v in unet_of(tiny_pipeline).items() if not torch.equal(v, state_of(again)[k])
    ]
    # a bias before a group of one channel's norm may stay
    assert len(changed) > 0.9 * len(unet_of(tiny_pipeline))
    start = load_pipeline(tiny_pipeline)
    for name in ("vae", "text_encoder"):
        trained = getattr(again, name).module
        assert not trained.training
        for p, q in zip(trained.parameters(), getattr(start, name).parameters(), strict=True):
            assert torch.equal(p, q)
            assert p.grad is None


def test_the_loss_is_the_error_of_the_noise_that_was_added(tiny_pipeline, tmp_path):
    model = module(tiny_pipeline, caption_dropout=0.0)
    fit(model, tmp_path, epochs=1)
    batch = next(iter(Captioned().train_dataloader()))
    ours = model.noise_prediction_loss(batch, batch["prompt"], generator(5))
    # the same draws, in the same order, through stock diffusers
    draw = generator(5)
    pipeline = load_pipeline(tiny_pipeline)
    pipeline.unet.load_state_dict(model.unet.state_dict())
    posterior = pipeline.vae.encode(batch["image"] * 2 - 1).latent_dist
    latents = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=draw)
    latents = latents * pipeline.vae.config.scaling_factor
    noise = torch.randn(latents.shape, generator=draw)
    times = torch.randint(1000, (4,), generator=draw)
    alpha = pipeline.scheduler.alphas_cumprod[times].view(-1, 1, 1, 1)
    noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    ids = pipeline.tokenizer(
        batch["prompt"], padding="max_length", max_length=20, return_tensors="pt"
    ).input_ids
    predicted = pipeline.unet(noisy, times, pipeline.text_encoder(ids)[0]).sample
    assert ours.item() == pytest.approx((predicted - noise).square().mean().item(), rel=1e-5)


def test_cached_latents_train_the_same_weights(tiny_pipeline, tmp_path):
    class Counted(StableDiffusion):
        encoded = 0

        def configure_model(self):
            super().configure_model()
            encode = self.vae.module.encode

            def counted(images):
                self.encoded += len(images)
                return encode(images)

            self.vae.module.encode = counted

    # AdamW would turn the last digit of a gradient near zero into a step
    options = {"pipeline": tiny_pipeline, "optimizer": partial(torch.optim.SGD, lr=0.1), "steps": 4}
    plain, cached = Counted(**options), Counted(**options, cache_latents=True)
    for model in (plain, cached):
        fit(model, tmp_path, epochs=3, limit_val_batches=0)
    assert (plain.encoded, cached.encoded) == (48, 16)
    assert distance(state_of(plain), state_of(cached)) < 1e-6


def test_augmented_images_are_not_cached(tiny_pipeline, tmp_path):
    with pytest.raises(UserError, match="augment: false"):
        fit(module(tiny_pipeline, cache_latents=True), tmp_path, data=Captioned(augment=True))
    # the real one tells in the same way
    assert ISICDataModule(None, augment=True).augment
    fit(module(tiny_pipeline), tmp_path, epochs=1, data=Captioned(augment=True))


@pytest.mark.parametrize("schedule", [False, True])
def test_a_resumed_run_ends_bit_for_bit_like_an_unbroken_one(tiny_pipeline, tmp_path, schedule):
    def halving(optimizer):
        return torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.5)

    options = {"lr_scheduler": halving if schedule else None}
    unbroken = module(tiny_pipeline, **options)
    end = fit(unbroken, tmp_path, epochs=4)
    saver = ModelCheckpoint(tmp_path, filename="half")
    fit(
        module(tiny_pipeline, **options),
        tmp_path,
        epochs=2,
        enable_checkpointing=True,
        callbacks=[saver],
    )
    resumed = module(tiny_pipeline, **options)
    resumed_end = fit(resumed, tmp_path, epochs=4, ckpt_path=tmp_path / "half.ckpt")
    assert distance(state_of(unbroken), state_of(resumed)) == 0
    assert (
        end.optimizers[0].param_groups[0]["lr"] == resumed_end.optimizers[0].param_groups[0]["lr"]
    )
    if schedule:
        # 16 steps, stepped once per optimizer step
        assert end.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-3 / 2**5)
    for ours, theirs in zip(end.optimizers, resumed_end.optimizers, strict=True):
        a, b = (o.state_dict()["state"] for o in (ours, theirs))
        assert all(torch.equal(a[i][name], b[i][name]) for i in a for name in a[i])


def test_the_export_samples_the_same_image_in_stock_diffusers(tiny_pipeline, tmp_path):
    model = module(tiny_pipeline)
    fit(model, tmp_path, epochs=3)
    model.export(tmp_path / "exported")
    image = model.generate([PROMPTS[5]], torch.tensor([11]))
    stock = StableDiffusionPipeline.from_pretrained(tmp_path / "exported")
    stock.set_progress_bar_config(disable=True)
    assert isinstance(stock.scheduler, DDIMScheduler)
    latents = torch.randn(1, 4, 8, 8, generator=generator(11))
    draws = generator(11)
    torch.randn(1, 4, 8, 8, generator=draws)
    theirs = stock(
        PROMPTS[5], num_inference_steps=4, guidance_scale=3.0, eta=1.0, latents=latents,
        generator=draws, output_type="pt",
    ).images  # fmt: skip
    torch.testing.assert_close(image, theirs, rtol=0, atol=1e-4)
    before = module(tiny_pipeline)
    fit(before, tmp_path, epochs=1, limit_train_batches=0, limit_val_batches=1)
    assert (before.generate([PROMPTS[5]], torch.tensor([11])) - image).abs().max() > 1e-2


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_captions_are_dropped_at_the_rate_asked_for(tiny_pipeline, share):
    class Listener(StableDiffusion):
        current_epoch, global_rank = 0, 0

        def noise_prediction_loss(self, batch, prompts, draw):
            self.heard += prompts
            return torch.zeros(())

        def log(self, *args, **options):
            pass

    model = Listener(tiny_pipeline, caption_dropout=share)
    model.heard = []
    for i in range(250):
        model.training_step({"prompt": list(PROMPTS[:8])}, i)
    dropped = sum(p == "" for p in model.heard) / 2000
    assert dropped == pytest.approx(share, abs=0.03)
    kept = {p for p in model.heard if p}
    assert kept == set(PROMPTS[:8])


def test_every_rank_epoch_and_batch_draws_noise_of_its_own(tiny_pipeline):
    class Ranked(StableDiffusion):
        global_rank = 0

    model, drawn = Ranked(tiny_pipeline), []
    for model.global_rank in (0, 1):
        for epoch in (0, 1):
            for batch_idx in (0, 1):
                draw = model.draws("fine-tune", epoch, batch_idx)
                drawn.append(torch.randn(64, generator=draw))
    assert (torch.corrcoef(torch.stack(drawn)) - torch.eye(8)).abs().max() < 0.5
    again = torch.randn(64, generator=generator(key(42, "fine-tune", 1, 1, 1)))
    assert torch.equal(drawn[-1], again)


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_a_share_of_captions_that_is_none(tiny_pipeline, share):
    with pytest.raises(UserError, match=r"caption_dropout=.*0 to below 1"):
        module(tiny_pipeline, caption_dropout=share)


def test_bf16_trains_float32_weights(tiny_pipeline, tmp_path):
    model = module(tiny_pipeline)
    fit(model, tmp_path, precision="bf16-mixed")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert flat(model.unet.parameters()).isfinite().all()
