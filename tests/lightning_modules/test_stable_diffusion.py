from functools import partial

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint

from rl4med_ddpo.callbacks import Export
from rl4med_ddpo.foundation.errors import UserError
from rl4med_ddpo.foundation.randomness import generator, key
from rl4med_ddpo.lightning_modules import StableDiffusion
from rl4med_ddpo.lightning_modules.pipelines.load import load_pipeline
from support.dermoscopy import PROMPTS
from support.fine_tuning import SGD, Captioned, adamw, fit, images_of, module, unet_of
from support.tiny import distance, flat, state_of


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
        trained = getattr(again.model, name).module
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
    pipeline.unet.load_state_dict(model.model.unet.state_dict())
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


EVERYTHING = {
    "train": "lora",
    "lora_alpha": 8,
    "min_snr_gamma": 5.0,
    "noise_offset": 0.1,
    "gradient_checkpointing": True,
    "lr_scheduler": partial(torch.optim.lr_scheduler.StepLR, step_size=3, gamma=0.5),
}


@pytest.mark.parametrize("everything", [False, True])
def test_a_resumed_run_ends_bit_for_bit_like_an_unbroken_one(
    tiny_pipeline, isic, tmp_path, everything
):
    options = EVERYTHING | {"cache": str(tmp_path / "cache")} if everything else {}
    trainer = {"accumulate_grad_batches": 2 if everything else 1, "enable_checkpointing": True}

    def run(epochs, ckpt_path=None):
        model = module(tiny_pipeline, **options)
        callbacks = [ModelCheckpoint(tmp_path, filename=f"{epochs}")]
        callbacks += [EMAWeightAveraging(decay=0.9)] if everything else []
        data = images_of(isic) if everything else None
        end = fit(model, tmp_path, epochs, data, ckpt_path, callbacks=callbacks, **trainer)
        return model, end

    unbroken, end = run(4)
    run(2)
    resumed, resumed_end = run(4, tmp_path / "2.ckpt")
    assert distance(state_of(unbroken), state_of(resumed)) == 0
    rates = [e.optimizers[0].param_groups[0]["lr"] for e in (end, resumed_end)]
    assert rates[0] == rates[1]
    assert (rates[0] < 1e-3) == everything
    for ours, theirs in zip(end.optimizers, resumed_end.optimizers, strict=True):
        a, b = (o.state_dict()["state"] for o in (ours, theirs))
        assert all(torch.equal(a[i][name], b[i][name]) for i in a for name in a[i])


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_fused_optimizer_takes_the_same_clipped_steps(tiny_pipeline, tmp_path, precision):
    def weights(fused):
        # plain momentum: the steps of AdamW would be as long with gradients left unclipped
        sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9, fused=fused)
        model = module(tiny_pipeline, optimizer=sgd)
        fit(model, tmp_path, precision=precision, gradient_clip_val=0.1)
        return state_of(model)

    fused = weights(fused=True)
    assert distance(fused, weights(fused=False)) < 1e-6
    assert distance(fused, unet_of(tiny_pipeline)) > 1e-4


def drawn(stock):
    """The image of prompt 5 and noise key 11, by diffusers' own code."""
    stock.set_progress_bar_config(disable=True)
    draws = generator(11)
    latents = torch.randn(1, 4, 8, 8, generator=draws)
    return stock(
        PROMPTS[5], num_inference_steps=4, guidance_scale=3.0, eta=1.0, latents=latents,
        generator=draws, output_type="pt",
    ).images  # fmt: skip


def test_the_export_samples_the_same_image_in_stock_diffusers(tiny_pipeline, tmp_path):
    model = module(tiny_pipeline)
    fit(model, tmp_path, epochs=3)
    model.export(tmp_path / "exported")
    image = model.generate([PROMPTS[5]], torch.tensor([11]))
    stock = StableDiffusionPipeline.from_pretrained(tmp_path / "exported")
    assert isinstance(stock.scheduler, DDIMScheduler)
    torch.testing.assert_close(image, drawn(stock), rtol=0, atol=1e-4)
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
    assert flat(model.model.unet.parameters()).isfinite().all()


def test_gradient_checkpointing_trains_the_same_weights(tiny_pipeline, tmp_path):
    plain, checkpointed = (
        module(tiny_pipeline, gradient_checkpointing=on, **SGD) for on in (False, True)
    )
    for model in (plain, checkpointed):
        fit(model, tmp_path, epochs=1)
    assert checkpointed.model.unet.is_gradient_checkpointing
    assert distance(state_of(plain), state_of(checkpointed)) < 1e-6


def test_accumulated_batches_step_once_by_the_mean_of_their_gradients(tiny_pipeline, tmp_path):
    model = module(tiny_pipeline, caption_dropout=0.0, **SGD)
    trainer = fit(model, tmp_path, 1, accumulate_grad_batches=4, limit_val_batches=0)
    assert trainer.global_step == 1
    slow = module(tiny_pipeline, caption_dropout=0.0, **SGD)
    fit(slow, tmp_path, 1, limit_train_batches=0, limit_val_batches=0)
    for i, batch in enumerate(Captioned().train_dataloader()):
        draw = slow.draws("fine-tune", 0, i)
        torch.rand(4, generator=draw)
        (slow.noise_prediction_loss(batch, batch["prompt"], draw) / 4).backward()
    with torch.no_grad():
        for p in slow.model.unet.parameters():
            p -= 0.1 * p.grad
    assert distance(state_of(model), state_of(slow)) < 1e-6


def test_the_exported_weights_are_the_averaged_ones(tiny_pipeline, tmp_path):
    seen = []

    class Watched(StableDiffusion):
        def on_train_batch_end(self, *args):
            seen.append(self.model.unet.conv_out.bias.detach().clone())

    model = Watched(pipeline=tiny_pipeline, optimizer=adamw, steps=4)
    exported = tmp_path / "pipeline"
    callbacks = [EMAWeightAveraging(decay=0.8), Export(str(exported), weights="last")]
    fit(model, tmp_path, 1, callbacks=callbacks)
    # torch's AveragedModel starts from the weights after the first step
    average = seen[0]
    for bias in seen[1:]:
        average = 0.8 * average + 0.2 * bias
    torch.testing.assert_close(load_pipeline(str(exported)).unet.conv_out.bias, average)


@pytest.mark.parametrize("alpha", [None, 16])
def test_adapters_alone_are_trained_and_exported_in_both_forms(tiny_pipeline, tmp_path, alpha):
    model = module(tiny_pipeline, train="lora", lora_rank=4, lora_alpha=alpha)
    fit(model, tmp_path, epochs=3)
    assert all("lora" in name for name in state_of(model))
    model.export(tmp_path / "exported")
    image = model.generate([PROMPTS[5]], torch.tensor([11]))
    start = load_pipeline(tiny_pipeline)
    start.load_lora_weights(tmp_path / "exported" / "lora")
    whole = StableDiffusionPipeline.from_pretrained(tmp_path / "exported")
    for stock in (start, whole):
        torch.testing.assert_close(drawn(stock), image, rtol=0, atol=1e-4)
    assert (drawn(load_pipeline(tiny_pipeline)) - image).abs().max() > 2e-3
    # the next stage starts from the merged pipeline
    assert load_pipeline(str(tmp_path / "exported"))


def test_min_snr_and_noise_offset_enter_the_loss(tiny_pipeline, tmp_path):
    batch = next(iter(Captioned().train_dataloader()))

    def loss(**options):
        model = module(tiny_pipeline, **options)
        fit(model, tmp_path, 1, limit_train_batches=0, limit_val_batches=0)
        return model.noise_prediction_loss(batch, batch["prompt"], generator(5)).item()

    plain = loss()
    # a gamma above every SNR changes nothing, one below weighs less
    assert loss(min_snr_gamma=1e6) == pytest.approx(plain, rel=1e-6)
    assert 0 < loss(min_snr_gamma=0.5) < plain
    assert loss(noise_offset=0.5) != pytest.approx(plain, rel=1e-2)
    for wrong in ({"min_snr_gamma": 0.0}, {"noise_offset": -0.1}):
        with pytest.raises(UserError, match="above 0, or null"):
            module(tiny_pipeline, **wrong)
