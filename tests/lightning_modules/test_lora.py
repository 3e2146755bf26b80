import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig

from rl4med_ddpo.lightning_modules.diffusion.lora import ADAPTER, add_lora, load_policy, save_lora
from rl4med_ddpo.lightning_modules.pipelines.load import load_pipeline


def predict(unet):
    draw = torch.Generator().manual_seed(0)
    latents, text = torch.randn(2, 4, 8, 8, generator=draw), torch.randn(2, 20, 16, generator=draw)
    with torch.no_grad():
        return unet(latents, torch.tensor([1, 900]), text, return_dict=False)[0]


def train(unet):
    """Stand in for training: both factors of each adapter away from zero."""
    draw = torch.Generator().manual_seed(1)
    for name, p in sorted(unet.named_parameters()):
        if "lora_" in name:
            p.data = torch.randn(p.shape, generator=draw) * 0.3


def test_adapters_start_as_nothing_and_alone_are_trainable(tiny_pipeline):
    unet = load_pipeline(tiny_pipeline).unet
    before = predict(unet)
    add_lora(unet, rank=2, seed=7)
    assert torch.equal(predict(unet), before)
    trainable = {name for name, p in unet.named_parameters() if p.requires_grad}
    assert trainable == {name for name, _ in unet.named_parameters() if "lora_" in name}
    for layer in ("to_q", "to_k", "to_v", "to_out.0"):
        assert any(f"attn2.{layer}.lora_A" in name for name in trainable)
        assert any(f"attn1.{layer}.lora_B" in name for name in trainable)


def test_the_seed_decides_the_first_weights_and_leaves_the_global_stream_alone(tiny_pipeline):
    def first(seed):
        unet = load_pipeline(tiny_pipeline).unet
        state = torch.random.get_rng_state()
        add_lora(unet, rank=2, seed=seed)
        assert torch.equal(torch.random.get_rng_state(), state)
        return torch.cat([p.flatten() for n, p in sorted(unet.named_parameters()) if "lora_A" in n])

    assert torch.equal(first(7), first(7))
    assert not torch.equal(first(7), first(8))


@pytest.mark.parametrize("alpha", [2, 16])
def test_an_export_is_the_same_policy_in_stock_diffusers(tiny_pipeline, tmp_path, alpha):
    unet = load_pipeline(tiny_pipeline).unet
    before = predict(unet)
    if alpha == 2:
        add_lora(unet, rank=2, seed=7)
    else:
        targets = ["to_q", "to_k", "to_v", "to_out.0"]
        unet.add_adapter(LoraConfig(r=2, lora_alpha=alpha, target_modules=targets), ADAPTER)
    train(unet)
    trained = predict(unet)
    assert (trained - before).abs().max() > 0.01
    save_lora(unet, tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]

    stock = StableDiffusionPipeline.from_pretrained(tiny_pipeline)
    stock.load_lora_weights(tmp_path)
    torch.testing.assert_close(predict(stock.unet), trained)

    ours = load_pipeline(tiny_pipeline).unet
    load_policy(ours, tmp_path)
    assert torch.equal(predict(ours), trained)
    assert not any(p.requires_grad for p in ours.parameters())


def test_a_full_policy_replaces_the_weights(tiny_pipeline, tmp_path):
    pipeline = load_pipeline(tiny_pipeline)
    before = predict(pipeline.unet)
    for p in pipeline.unet.parameters():
        p.data.mul_(1.1)
    pipeline.save_pretrained(tmp_path)
    ours = load_pipeline(tiny_pipeline).unet
    load_policy(ours, tmp_path)
    assert torch.equal(predict(ours), predict(pipeline.unet))
    assert not torch.equal(predict(ours), before)
