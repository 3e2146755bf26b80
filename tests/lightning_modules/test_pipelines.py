import json
import shutil
import socket
import time
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from rl4med_ddpo.base_pipeline.build import build_pipeline
from rl4med_ddpo.foundation.errors import UserError
from rl4med_ddpo.lightning_modules.pipelines import hub
from rl4med_ddpo.lightning_modules.pipelines.load import load_pipeline, save_pipeline
from rl4med_ddpo.lightning_modules.pipelines.source import COMPONENTS, NETWORKS, SD15, is_hub_id
from support.ldm_format import write_single_file


def test_a_pipeline_survives_saving_and_loading(tiny_pipeline, tmp_path):
    pipeline = load_pipeline(tiny_pipeline)
    assert isinstance(pipeline.scheduler, DDIMScheduler)
    for name in ("unet", "vae", "text_encoder"):
        network = getattr(pipeline, name)
        assert not network.training
        assert not any(p.requires_grad for p in network.parameters())
        assert {p.dtype for p in network.parameters()} == {torch.float32}
    save_pipeline(pipeline, tmp_path / "again")
    assert not list(tmp_path.rglob("*.bin"))
    again = StableDiffusionPipeline.from_pretrained(tmp_path / "again")
    for name, tensor in pipeline.unet.state_dict().items():
        assert torch.equal(again.unet.state_dict()[name], tensor)


def test_older_tools_find_the_text_encoder_s_weights_by_their_names(tiny_pipeline, tmp_path):
    pipeline = load_pipeline(tiny_pipeline)
    for folder in (tmp_path / "once", tmp_path / "twice"):
        save_pipeline(pipeline, folder)
        saved = load_file(folder / "text_encoder" / "model.safetensors")
        # the names in Stable Diffusion v1.5's own files
        assert "text_model.embeddings.token_embedding.weight" in saved
        assert "text_model.encoder.layers.0.self_attn.q_proj.weight" in saved
        assert all(name.startswith("text_model.") for name in saved)
        again = load_pipeline(str(folder)).text_encoder.state_dict()
        for name, tensor in pipeline.text_encoder.state_dict().items():
            assert torch.equal(again[name], tensor)
        pipeline = load_pipeline(str(folder))


def test_any_scheduler_becomes_ddim_and_keeps_its_noise_schedule(tiny_pipeline, tmp_path):
    folder = shutil.copytree(tiny_pipeline, tmp_path / "pndm")
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("DDIMScheduler", "PNDMScheduler"))
    config = folder / "scheduler" / "scheduler_config.json"
    settings = json.loads(config.read_text())
    settings |= {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "beta_end": 0.02}
    config.write_text(json.dumps(settings))
    scheduler = load_pipeline(str(folder)).scheduler
    assert isinstance(scheduler, DDIMScheduler)
    assert scheduler.config.beta_end == 0.02
    assert scheduler.config.set_alpha_to_one is False
    assert scheduler.config.clip_sample is False


def test_folders_and_hub_ids(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("stable-diffusion-v1-5/stable-diffusion-v1-5")
    assert not is_hub_id("runs/sd/pipeline")
    assert is_hub_id("owner/name@refs/pr/3")
    assert not is_hub_id("/somewhere/else")
    assert not is_hub_id("models/v1-5.safetensors")
    assert is_hub_id("runs/sd")
    Path("runs/sd").mkdir(parents=True)
    assert not is_hub_id("runs/sd")


def test_no_folder(tmp_path):
    with pytest.raises(UserError) as error:
        load_pipeline(str(tmp_path / "nowhere"))
    said = str(error.value)
    assert f"no pipeline at {tmp_path / 'nowhere'}: no such folder" in said
    assert "fit --config sd.yaml" in said
    assert "stable-diffusion-v1-5/stable-diffusion-v1-5" in said


def test_a_folder_without_a_pipeline(tmp_path):
    with pytest.raises(UserError, match=r"no model_index\.json in it"):
        load_pipeline(str(tmp_path))


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_missing_component(tiny_pipeline, tmp_path, component):
    folder = shutil.copytree(tiny_pipeline, tmp_path / "copy")
    shutil.rmtree(folder / component)
    with pytest.raises(UserError, match=f"lacks {component}; Stable Diffusion has unet, vae"):
        load_pipeline(str(folder))


def test_a_missing_file_of_weights(tiny_pipeline, tmp_path):
    folder = shutil.copytree(tiny_pipeline, tmp_path / "copy")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError) as error:
        load_pipeline(str(folder))
    assert str(folder) in str(error.value)
    assert "hf download" not in str(error.value)
    assert "diffusion_pytorch_model.safetensors" in str(error.value)


def test_a_damaged_file_of_weights(tiny_pipeline, tmp_path):
    folder = shutil.copytree(tiny_pipeline, tmp_path / "copy")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError) as error:
        load_pipeline(str(folder))
    assert str(folder) in str(error.value)


def test_another_kind_of_pipeline(tiny_pipeline, tmp_path):
    folder = shutil.copytree(tiny_pipeline, tmp_path / "copy")
    index = folder / "model_index.json"
    index.write_text(
        index.read_text().replace("StableDiffusionPipeline", "StableDiffusionXLPipeline")
    )
    with pytest.raises(UserError, match="StableDiffusionXLPipeline"):
        load_pipeline(str(folder))


def test_a_hub_id_that_cannot_be_had(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as error:
        load_pipeline("nobody/no-such-pipeline")
    said = str(error.value)
    assert "hf download nobody/no-such-pipeline" in said
    assert "HF_HOME" in said


def states(pipeline):
    return {
        f"{name}.{key}": tensor
        for name in NETWORKS
        for key, tensor in getattr(pipeline, name).state_dict().items()
    }


def alike(one, other):
    one, other = states(one), states(other)
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def edit_weights(file, edit):
    """Rewrite a file of weights after `edit` has changed its mapping of tensors."""
    weights = load_file(file)
    edit(weights)
    save_file(weights, file)


@pytest.mark.parametrize("component", NETWORKS)
def test_a_missing_tensor_is_no_random_one(tiny_pipeline, tmp_path, component):
    folder = shutil.copytree(tiny_pipeline, tmp_path / "copy")
    (file,) = (folder / component).glob("*.safetensors")
    name = sorted(load_file(file))[3]
    edit_weights(file, lambda weights: weights.pop(name))
    named = name.removeprefix("text_model.")
    with pytest.raises(UserError, match=rf"do not fit its config\.json \(missing: 1.*{named}"):
        load_pipeline(str(folder))


@pytest.mark.parametrize("component", NETWORKS)
def test_tensors_of_another_size(tiny_pipeline, tmp_path, component):
    folder = shutil.copytree(tiny_pipeline, tmp_path / "copy")
    (file,) = (folder / component).glob("*.safetensors")
    name = sorted(load_file(file))[3]
    edit_weights(file, lambda weights: weights.update({name: torch.zeros(3)}))
    with pytest.raises(UserError, match="do not fit"):
        load_pipeline(str(folder))


def test_a_tensor_too_many(tiny_pipeline, tmp_path):
    folder = shutil.copytree(tiny_pipeline, tmp_path / "copy")
    (file,) = (folder / "unet").glob("*.safetensors")
    edit_weights(file, lambda weights: weights.update({"more": torch.zeros(3)}))
    with pytest.raises(UserError, match="unexpected: 1, such as more"):
        load_pipeline(str(folder))


def test_the_unet_alone_from_another_folder(tiny_pipeline, tmp_path):
    trained = load_pipeline(tiny_pipeline)
    with torch.no_grad():
        trained.unet.conv_out.bias.add_(1)
    save_pipeline(trained, tmp_path / "whole")
    trained.unet.save_pretrained(tmp_path / "unet_ema")
    for folder in ("whole", "unet_ema"):
        assert alike(load_pipeline(tiny_pipeline, unet=str(tmp_path / folder)), trained)
    assert not alike(load_pipeline(tiny_pipeline), trained)
    with pytest.raises(UserError, match=r"no U-Net at .*no config\.json"):
        load_pipeline(tiny_pipeline, unet=str(tmp_path))


def test_a_unet_for_other_latents(tiny_pipeline, tmp_path):
    other = build_pipeline(image_size=16, vae_channels=(8, 16), latent_channels=6,
                           unet_channels=(16, 32), text_width=32)  # fmt: skip
    other.unet.save_pretrained(tmp_path / "unet")
    with pytest.raises(UserError) as error:
        load_pipeline(tiny_pipeline, unet=str(tmp_path / "unet"))
    assert "latent channels: 6 of the U-Net, 4 here" in str(error.value)
    assert "text embedding: 32 of the U-Net, 16 here" in str(error.value)


@pytest.fixture
def single_file(tiny_pipeline, tmp_path):
    """A single file beside the configurations of its pipeline, and none of their weights."""
    folder = shutil.copytree(tiny_pipeline, tmp_path / "v1")
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    path = folder / "v1-pruned.safetensors"
    write_single_file(load_pipeline(tiny_pipeline), path)
    return path


def test_a_single_file_gives_the_pipeline_it_was_made_of(tiny_pipeline, single_file):
    loaded = load_pipeline(str(single_file))
    assert alike(loaded, load_pipeline(tiny_pipeline))
    assert isinstance(loaded.scheduler, DDIMScheduler)
    assert loaded.tokenizer("a nevus").input_ids


def test_a_single_file_takes_its_configurations_from_the_hubs_cache(
    tiny_pipeline, single_file, tmp_path, monkeypatch
):
    cache_of(monkeypatch, tmp_path / "cache", SD15, single_file.parent, weights=False)
    alone = tmp_path / "alone" / "model.safetensors"
    alone.parent.mkdir()
    shutil.copy(single_file, alone)
    assert alike(load_pipeline(str(alone)), load_pipeline(tiny_pipeline))


@pytest.mark.parametrize(
    "name",
    [
        "model.diffusion_model.out.2.bias",
        "first_stage_model.encoder.conv_in.bias",
        "cond_stage_model.transformer.text_model.final_layer_norm.bias",
    ],
)
def test_a_single_file_cut_of_a_tensor(single_file, name):
    edit_weights(single_file, lambda weights: weights.pop(name))
    with pytest.raises(UserError, match=r"some are missing|lacks 1 of the weights"):
        load_pipeline(str(single_file))


def test_a_single_file_of_another_family(single_file):
    xl = "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias"
    edit_weights(single_file, lambda w: w.update({xl: torch.zeros(1)}))
    with pytest.raises(UserError, match=r"of the family 'xl_base'; needed is a whole Stable Diff"):
        load_pipeline(str(single_file))


def test_files_that_are_no_pipelines(single_file, tmp_path):
    (tmp_path / "page.safetensors").write_text("<html>")
    save_file({"lora_unet_a": torch.zeros(2)}, tmp_path / "lora.safetensors")
    (tmp_path / "old.ckpt").write_bytes(b"pickle")
    for name, says in [
        ("page.safetensors", "damaged or no safetensors"),
        ("lora.safetensors", "without a U-Net"),
        ("old.ckpt", "may run code"),
        ("gone.safetensors", "no such file"),
    ]:
        with pytest.raises(UserError, match=says):
            load_pipeline(str(tmp_path / name))


def cache_of(monkeypatch, cache, repo, folder, weights=True, commit="a" * 40):
    """Lay a pipeline out as the hub's cache does, and let nothing ask the network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    place = cache / f"models--{repo.replace('/', '--')}"
    snapshot = place / "snapshots" / commit
    shutil.copytree(
        folder, snapshot, ignore=None if weights else shutil.ignore_patterns("*.safetensors")
    )
    (place / "refs").mkdir(exist_ok=True)
    (place / "refs" / "main").write_text(commit)
    return snapshot


def test_a_hub_id_and_its_revisions_come_from_the_cache(tiny_pipeline, tmp_path, monkeypatch):
    newer = load_pipeline(tiny_pipeline)
    with torch.no_grad():
        newer.unet.conv_out.bias.add_(1)
    save_pipeline(newer, tmp_path / "newer")
    cache = tmp_path / "cache"
    cache_of(monkeypatch, cache, "some/pipeline", tiny_pipeline, commit="1" * 40)
    cache_of(monkeypatch, cache, "some/pipeline", tmp_path / "newer", commit="2" * 40)
    assert alike(load_pipeline("some/pipeline"), newer)
    assert alike(load_pipeline("some/pipeline@" + "2" * 40), newer)
    assert alike(load_pipeline("some/pipeline@" + "1" * 40), load_pipeline(tiny_pipeline))
    with pytest.raises(UserError, match="at revision v9 is not in the hub's cache") as error:
        load_pipeline("some/pipeline@v9")
    assert "--revision v9" in str(error.value)


def test_a_cached_pipeline_without_its_weights(tiny_pipeline, tmp_path, monkeypatch):
    cache_of(monkeypatch, tmp_path / "cache", "some/pipeline", tiny_pipeline, weights=False)
    with pytest.raises(UserError, match=r"hf download some/pipeline --include 'model_index\.json'"):
        load_pipeline("some/pipeline")


def test_a_network_that_swallows_everything_costs_less_than_five_seconds(tmp_path, monkeypatch):
    assert hub.PATIENCE < 5
    monkeypatch.setattr(hub, "PATIENCE", 1.0)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        start = time.monotonic()
        with pytest.raises(UserError, match="hf download nobody/no-such-pipeline"):
            load_pipeline("nobody/no-such-pipeline")
        assert 0.9 < time.monotonic() - start < 2
