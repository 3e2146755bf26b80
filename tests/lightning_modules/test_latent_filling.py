import shutil

import pytest
import torch
from PIL import Image

from rl4med_ddpo.fault_tolerance.settings import settings_of
from rl4med_ddpo.foundation.errors import UserError
from rl4med_ddpo.lightning_modules import StableDiffusion
from rl4med_ddpo.lightning_modules.pipelines.load import load_pipeline, save_pipeline
from support.fine_tuning import SGD, fit, images_of, module
from support.tiny import distance, state_of


class Counted(StableDiffusion):
    """Counts the images that go through the autoencoder, and the prompts through the encoder."""

    encoded = read = 0

    def configure_model(self):
        if not hasattr(self, "model"):
            super().configure_model()
            encode, read = self.model.vae.module.encode, self.model.text_encoder.module.forward

            def counted(images, **options):
                self.encoded += len(images)
                return encode(images, **options)

            def counted_text(ids):
                self.read += len(ids)
                return read(ids)

            self.model.vae.module.encode = counted
            self.model.text_encoder.module.forward = counted_text


@pytest.mark.parametrize("augment", [False, True])
def test_cached_latents_train_the_same_weights(tiny_pipeline, isic, tmp_path, augment):
    plain = Counted(tiny_pipeline, **SGD)
    cached = Counted(tiny_pipeline, **SGD, cache=str(tmp_path / "cache"))
    data = images_of(isic, augment)
    for model in (plain, cached):
        fit(model, tmp_path, epochs=3, data=images_of(isic, augment))
    train, val = len(data.splits.train), len(data.splits.val)
    assert plain.encoded == 3 * (train + val)
    # each image once, in each of its four flips if it is flipped
    assert cached.encoded == train * (4 if augment else 1) + val
    assert distance(state_of(plain), state_of(cached)) < 1e-6
    again = Counted(tiny_pipeline, **SGD, cache=str(tmp_path / "cache"))
    fit(again, tmp_path, epochs=3, data=images_of(isic, augment, batch_size=4))
    assert (again.encoded, again.read) == (0, 0)
    assert distance(state_of(cached), state_of(again)) == 0


def test_cached_runs_do_not_open_the_images(tiny_pipeline, isic, tmp_path, monkeypatch):
    cache = str(tmp_path / "cache")
    fit(module(tiny_pipeline, cache=cache), tmp_path, epochs=1, data=images_of(isic))
    monkeypatch.setattr("rl4med_ddpo.datamodules.isic_dataset.read_image", pytest.fail)
    fit(module(tiny_pipeline, cache=cache), tmp_path, epochs=1, data=images_of(isic))


def test_a_changed_image_size_or_autoencoder_is_encoded_anew(tiny_pipeline, isic, tmp_path):
    folder, cache = shutil.copytree(isic, tmp_path / "isic"), str(tmp_path / "cache")

    def encoded(pipeline=tiny_pipeline, **options):
        model = Counted(pipeline, **SGD, cache=cache)
        fit(model, tmp_path, 1, images_of(folder, augment=False, **options), limit_train_batches=1)
        return model.encoded

    both = encoded()
    assert both > 10
    assert encoded() == 0
    # another picture under the same name
    one, other, *_ = images_of(folder).dataset("train").paths
    one.write_bytes(other.read_bytes())
    assert encoded() == 0, "the other's latent is its own now"
    Image.new("RGB", (16, 16), "green").save(one)
    assert encoded() == 1
    assert encoded(size=32) == both
    assert encoded(resize="crop") == both
    changed = load_pipeline(tiny_pipeline)
    with torch.no_grad():
        changed.vae.encoder.conv_in.bias.add_(1)
    save_pipeline(changed, tmp_path / "changed")
    assert encoded(str(tmp_path / "changed")) == both


def test_filling_that_was_stopped_goes_on_to_the_same_latents(tiny_pipeline, isic, tmp_path):
    class Stopped(Counted):
        def encode(self, images):
            if self.encoded == 7:
                raise KeyboardInterrupt
            return super().encode(images)

    def files(folder):
        return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*.safetensors")}

    half, whole = tmp_path / "half", tmp_path / "whole"
    with pytest.raises(SystemExit):
        fit(Stopped(tiny_pipeline, **SGD, cache=str(half)), tmp_path, 1, images_of(isic))
    assert len(files(half)) == 7
    for cache in (half, whole):
        fit(module(tiny_pipeline, cache=str(cache)), tmp_path, 1, images_of(isic))
    assert files(half) == files(whole)


def test_a_damaged_entry_of_the_cache_is_named(tiny_pipeline, isic, tmp_path):
    cache = tmp_path / "cache"
    fit(module(tiny_pipeline, cache=str(cache)), tmp_path, 1, images_of(isic))
    for entry in cache.rglob("*.safetensors"):
        entry.write_bytes(entry.read_bytes()[:50])
    with pytest.raises(UserError, match=r"cannot read .*safetensors from the cache.*\n.*Delete"):
        fit(module(tiny_pipeline, cache=str(cache)), tmp_path, 1, images_of(isic))


def test_a_cache_that_cannot_be_written(tiny_pipeline, isic, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the cache"):
        fit(module(tiny_pipeline, cache=str(tmp_path / "file")), tmp_path, 1, images_of(isic))


def test_a_cache_for_distorted_images(tiny_pipeline, isic, tmp_path):
    images = images_of(isic)
    images.distort = True
    with pytest.raises(UserError, match="one latent an image"):
        fit(module(tiny_pipeline, cache=str(tmp_path / "cache")), tmp_path, 1, images)


def test_a_cache_for_data_without_files(tiny_pipeline, tmp_path):
    with pytest.raises(UserError, match=r"Captioned does not have: set .*cache: null"):
        fit(module(tiny_pipeline, cache=str(tmp_path / "cache")), tmp_path)


def test_a_cache_that_grew_is_no_other_experiment(tmp_path):
    def settings():
        init = {"pipeline": "owner/name", "cache": str(tmp_path / "cache")}
        data = {"class_path": "ISICDataModule", "init_args": {"copies": str(tmp_path / "copies")}}
        return settings_of({"model": {"class_path": "M", "init_args": init}, "data": data})

    before = settings()
    for folder in ("cache", "copies"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "entry").write_text("new")
    assert settings() == before
