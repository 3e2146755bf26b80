import pytest
import torch
from safetensors.torch import load_file, save_file

from rl4med_ddpo.foundation.errors import UserError
from rl4med_ddpo.lightning_modules.diffusion.lora import add_lora, merged, save_lora
from rl4med_ddpo.lightning_modules.pipelines.kohya import DIFFUSERS_FILE, convert
from rl4med_ddpo.lightning_modules.pipelines.load import load_pipeline


@pytest.fixture
def exported(tiny_pipeline, tmp_path):
    """A U-Net with adapters of rank 4 and alpha 6 that say something, and their folder."""
    unet = load_pipeline(tiny_pipeline).unet
    add_lora(unet, rank=4, seed=0, alpha=6)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in unet.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=draw) / 4)
    save_lora(unet, tmp_path / "lora")
    return unet, tmp_path / "lora"


def test_the_tools_compute_what_was_trained(exported, tiny_pipeline, tmp_path):
    unet, folder = exported
    convert(folder, tmp_path / "out" / "policy.safetensors")
    converted = load_file(tmp_path / "out" / "policy.safetensors")
    start = load_pipeline(tiny_pipeline).unet
    wanted = dict(merged(unet).named_parameters())
    used = set()
    for name, weight in start.named_parameters():
        stem = f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}"
        if f"{stem}.lora_down.weight" in converted:
            up, down, alpha = (
                converted[f"{stem}.{part}"] for part in ("lora_up.weight", "lora_down.weight",
                                                         "alpha")
            )  # fmt: skip
            weight = weight + alpha / down.shape[0] * (up @ down)
            used |= {k for k in converted if k.startswith(f"{stem}.")}
        torch.testing.assert_close(weight, wanted[name], rtol=1e-5, atol=1e-5)
    assert used == set(converted)
    assert len(used) > 10


def test_stock_diffusers_reads_the_converted_file_and_the_folder_alike(
    exported, tiny_pipeline, tmp_path
):
    unet, folder = exported
    convert(folder, tmp_path / "policy.safetensors")
    x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 16)
    expected = unet(x, 7, text).sample
    for source in (folder, tmp_path / "policy.safetensors"):
        stock = load_pipeline(tiny_pipeline)
        assert (stock.unet(x, 7, text).sample - expected).abs().max() > 1e-2
        stock.load_lora_weights(source)
        torch.testing.assert_close(stock.unet(x, 7, text).sample, expected, rtol=0, atol=1e-4)


def test_a_folder_without_adapters(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / DIFFUSERS_FILE)
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="is no file of exported adapters"):
            convert(folder, tmp_path / "out.safetensors")
