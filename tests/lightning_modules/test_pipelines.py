import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from datamodules.errors import UserError
from lightning_modules.pipelines import COMPONENTS, is_hub_id, load_pipeline, save_pipeline


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
    assert not is_hub_id("/somewhere/else")
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
