"""The autoencoder's losses against slow formulas, and its training on a tiny pipeline."""

from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor
from torch.utils.data import DataLoader

from rl4med_ddpo.base_pipeline.acceptance import drawn_images
from rl4med_ddpo.base_pipeline.build import build_pipeline
from rl4med_ddpo.foundation.errors import UserError
from rl4med_ddpo.lightning_modules.autoencoder import Autoencoder
from rl4med_ddpo.lightning_modules.classifier import AttributeClassifier
from rl4med_ddpo.lightning_modules.diffusion.reconstruction import (
    feature_loss,
    pixel_loss,
    signal_to_noise,
)
from support.dermoscopy import CONDITIONS

SIZE = 32


@pytest.fixture(scope="module")
def images() -> Tensor:
    return drawn_images(CONDITIONS, SIZE, seed=1)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("autoencoder") / "pipeline"
    build_pipeline(
        image_size=SIZE, vae_channels=(8, 16, 24), latent_channels=4, unet_channels=(16, 32)
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("classifier") / "last.ckpt"
    module = AttributeClassifier(backbone="test_efficientnet", pretrained=False, image_size=SIZE)
    module.configure_model()
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path)
    return str(path)


def loader(images: Tensor) -> DataLoader:
    items = [{"image": image, "id": f"image_{i}"} for i, image in enumerate(images)]
    return DataLoader(items, batch_size=8)


def test_the_networks_are_built_on_the_cpu_whatever_the_default_device(pipeline, classifier):
    module = Autoencoder(pipeline, classifier)
    with torch.device("meta"):
        module.configure_model()
    assert {p.device.type for p in module.parameters()} == {"cpu"}


def fit(module: Autoencoder, images: Tensor, root: Path, steps: int = 12) -> L.Trainer:
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=root,
        limit_val_batches=1,
    )
    trainer.fit(module, loader(images), loader(images))
    return trainer


def test_pixel_loss_agrees_with_a_loop_over_pixels():
    generator = np.random.default_rng(0)
    ours, theirs = generator.random((2, 2, 3, 5, 4))
    error = ours - theirs
    across = [abs(e[x + 1] - e[x]) for e in error.reshape(-1, 4) for x in range(3)]
    down = [
        abs(error[b, c, y + 1, x] - error[b, c, y, x])
        for b in range(2) for c in range(3) for y in range(4) for x in range(4)
    ]  # fmt: skip
    expected = np.abs(error).mean() + (error**2).mean() + np.mean(across) + np.mean(down)
    assert pixel_loss(torch.tensor(ours), torch.tensor(theirs)).item() == pytest.approx(expected)


def test_feature_loss_has_each_layers_size_as_its_unit():
    layers = [torch.rand(2, 3, 4, 4), torch.rand(2, 5, 2, 2)]
    moved = [layer * 1.1 for layer in layers]
    scaled = [layer * factor for layer, factor in zip(layers, (1000, 1e-3), strict=True)]
    assert feature_loss(moved, layers).item() == pytest.approx(0.1, rel=1e-4)
    moved = [layer * factor for layer, factor in zip(moved, (1000, 1e-3), strict=True)]
    assert feature_loss(moved, scaled).item() == pytest.approx(0.1, rel=1e-4)


def test_signal_to_noise_in_decibels():
    images = torch.zeros(2, 3, 4, 4)
    reconstruction = images + torch.tensor([0.1, 0.01]).view(2, 1, 1, 1)
    assert signal_to_noise(reconstruction, images).tolist() == pytest.approx([20.0, 40.0])


def test_training_lowers_the_error_and_leaves_the_encoder(pipeline, classifier, images, tmp_path):
    module = Autoencoder(pipeline, classifier, optimizer=lambda p: torch.optim.AdamW(p, lr=3e-3))
    module.configure_model()
    before = {name: value.clone() for name, value in module.vae.state_dict(keep_vars=True).items()}
    encoder = {n: p.clone() for n, p in module.vae.encoder.named_parameters()}
    torch.manual_seed(0)
    error = pixel_loss(module(images), images)
    fit(module, images, tmp_path, steps=40)
    assert pixel_loss(module(images), images) < 0.8 * error
    assert all(torch.equal(encoder[n], p) for n, p in module.vae.encoder.named_parameters())
    changed = module.vae.state_dict(keep_vars=True)
    assert all(not torch.equal(before[n], p) for n, p in changed.items() if n.endswith("conv_out"))


def test_checkpoint_holds_the_decoder_alone(pipeline, classifier, images, tmp_path):
    trainer = fit(Autoencoder(pipeline, classifier), images, tmp_path, steps=2)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert saved
    assert all(name.startswith("vae.decoder.") for name in saved)
    loaded = Autoencoder.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    ours = trainer.lightning_module.vae.state_dict()
    assert all(torch.equal(ours[name], value) for name, value in loaded.vae.state_dict().items())


def test_export_opens_as_a_stock_pipeline_with_the_trained_decoder(
    pipeline, classifier, images, tmp_path
):
    module = Autoencoder(pipeline, classifier)
    fit(module, images, tmp_path, steps=3)
    module.export(tmp_path / "pipeline")
    stock = StableDiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    for name, parameter in stock.vae.named_parameters():
        assert torch.equal(parameter, module.vae.get_parameter(name)), name


def test_features_are_the_classifiers_own(pipeline, classifier, images):
    module = Autoencoder(pipeline, classifier, layers=2)
    module.configure_model()
    network = module.perceptual.module
    first = network.network.bn1(network.network.conv_stem((images - network.mean) / network.std))
    features = module.features(images)
    assert len(features) == 2
    assert torch.allclose(features[0], network.network.blocks[0](first), atol=1e-6)


@pytest.mark.parametrize("wrong", [{"perceptual_weight": -1.0}, {"layers": 0}])
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        Autoencoder("anything", "anything", **wrong)
