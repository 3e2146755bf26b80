"""The full-size networks on the meta device: every shape, and not one number."""

import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    infer_diffusers_model_type,
)

from benchmarks.estimates import (
    activation_bytes,
    add_lora_on_meta,
    flops,
    forward_backward,
    on_meta,
    state_bytes,
    unet_inputs,
)
from rl4med_ddpo.base_pipeline.full_size import (
    full_size_autoencoder,
    full_size_text_encoder,
    full_size_unet,
)
from support.ldm_format import unet_name


@pytest.fixture(scope="module")
def unet():
    return on_meta(full_size_unet)


def count(network):
    return sum(p.numel() for p in network.parameters())


def test_the_sizes_are_the_published_ones(unet):
    assert count(unet) == 859_520_964
    assert count(on_meta(full_size_autoencoder)) == 83_653_863
    assert count(on_meta(full_size_text_encoder)) == 123_060_480
    assert all(p.is_meta for p in unet.parameters())
    assert unet(*unet_inputs(unet)).sample.shape == (1, 4, 64, 64)


def test_the_original_file_loads_into_every_tensor(unet):
    """By names and shapes: what diffusers makes of a file in the original naming."""
    own = unet.state_dict()
    original = {
        f"model.diffusion_model.{unet_name(name, unet.config)}": tensor
        for name, tensor in own.items()
    }
    assert infer_diffusers_model_type(original) == "v1"
    # 686 entries, as in v1-5-pruned.safetensors
    assert len(original) == 686
    assert original["model.diffusion_model.input_blocks.0.0.weight"].shape == (320, 4, 3, 3)
    assert original["model.diffusion_model.output_blocks.8.2.conv.weight"].shape[0] == 640
    converted = convert_ldm_unet_checkpoint(dict(original), dict(unet.config))
    assert {k: v.shape for k, v in converted.items()} == {k: v.shape for k, v in own.items()}


def test_adapters_sit_on_every_attention_projection():
    unet = on_meta(full_size_unet).requires_grad_(False)
    add_lora_on_meta(unet, rank=4)
    trained = {name: p for name, p in unet.named_parameters() if p.requires_grad}
    # 16 transformer blocks, self and cross attention, q k v and out, down and up
    assert len(trained) == 16 * 2 * 4 * 2
    assert sum(p.numel() for p in trained.values()) == 797_184
    assert all(p.is_meta for p in trained.values())


def test_operations_and_memory_are_those_of_the_real_sizes(unet):
    # Stable Diffusion v1.5 at 512 px: 0.80 TFLOP a forward pass, a backward pass twice that
    with torch.no_grad():
        forward = flops(lambda: unet(*unet_inputs(unet)))
    assert forward == pytest.approx(803e9, rel=0.01)
    assert flops(lambda: forward_backward(unet)) == pytest.approx(3 * forward, rel=0.01)
    # weights, gradients and two moments, four bytes each
    assert state_bytes(unet) == 16 * 859_520_964
    assert state_bytes(unet, average=True) == 20 * 859_520_964


def test_activations_are_counted_as_autograd_keeps_them():
    """On a network whose activations anyone can count: two layers and a ReLU keep three tensors."""

    def build(device):
        with torch.device(device):
            return torch.nn.Sequential(
                torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)
            )

    for device in ("cpu", "meta"):
        network, x = build(device), torch.empty(5, 8, device=device)
        # the input, and the ReLU's output, which the second layer keeps too
        assert activation_bytes(network, lambda n=network, x=x: n(x)) == 4 * 5 * (8 + 16)


def test_checkpointing_keeps_a_small_part_of_the_activations():
    unet = on_meta(full_size_unet).to(torch.bfloat16).train()
    whole = activation_bytes(unet, lambda: unet(*unet_inputs(unet)))
    unet.enable_gradient_checkpointing()
    assert activation_bytes(unet, lambda: unet(*unet_inputs(unet))) < whole / 5
    assert 0.5e9 < whole < 3e9
