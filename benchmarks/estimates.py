"""Time and memory of the three stages on 1, 4 and 8 GPUs, worked out and not measured.

    python -m benchmarks.estimates

counts operations and saved activations on the meta device, where nothing is computed, and divides
by an assumed share of the GPU's rate. Prints JSON.
"""

import json
from collections.abc import Callable
from typing import Any, TypeVar
from unittest.mock import patch

import timm
import torch
from diffusers import UNet2DConditionModel
from jsonargparse import auto_cli
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from rl4med_ddpo.base_pipeline.full_size import (
    full_size_autoencoder,
    full_size_text_encoder,
    full_size_unet,
)
from rl4med_ddpo.lightning_modules.diffusion.lora import add_lora

FLOAT32, BFLOAT16 = 4, 2
TRAIN_IMAGES = 12_004
BATCH = {"classifier": 32, "sd": 4, "ddpo": 8}
"""Images of a training pass on each GPU in the shipped configurations."""
Network = TypeVar("Network", bound=nn.Module)


def on_meta(build: Callable[[], Network]) -> Network:
    """Build a network whose tensors have shapes and no data."""
    with torch.device("meta"):
        return build()


def flops(run: Callable[[], Any]) -> int:
    """Count the operations of what `run` does; a multiplication and an addition are two."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def unet_inputs(unet: UNet2DConditionModel, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Return latents, timesteps and embeddings in the U-Net's dtype, on the meta device."""
    size, dtype = unet.config["sample_size"], unet.dtype
    with torch.device("meta"):
        return (
            torch.empty(batch, unet.config["in_channels"], size, size, dtype=dtype),
            torch.zeros(batch, dtype=torch.long),
            torch.empty(batch, 77, unet.config["cross_attention_dim"], dtype=dtype),
        )


def forward_backward(unet: UNet2DConditionModel, batch: int = 1) -> None:
    """Run one training pass."""
    unet(*unet_inputs(unet, batch)).sample.float().sum().backward()


def state_bytes(network: nn.Module, average: bool = False) -> int:
    """Return the bytes of float32 weights, and of gradients and AdamW's moments of the trained."""
    held = sum(p.numel() for p in network.parameters())
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    return FLOAT32 * (held * (1 + average) + 3 * trained)


class FusedAttention(torch.autograd.Function):
    """Keeps what fused attention kernels keep: queries, keys and values, and no L x L matrix."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return a tensor of the result's shape."""
        ctx.save_for_backward(query, key, value)
        return torch.empty_like(query)


def activation_bytes(network: nn.Module, run: Callable[[], Any]) -> int:
    """Return the bytes of distinct tensors that a forward pass keeps for the backward pass.

    Attention is counted as on a GPU; the meta device itself would take the unfused formula.
    """
    own = {id(t) for t in network.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        base = tensor if tensor._base is None else tensor._base
        if id(base) not in own:
            kept[id(base)] = base
        return tensor

    fused = patch(
        "torch.nn.functional.scaled_dot_product_attention",
        lambda query, key, value, **_: FusedAttention.apply(query, key, value),
    )
    with saved_tensors_hooks(keep, lambda tensor: tensor), fused:
        run()
    return sum(t.numel() * t.element_size() for t in kept.values())


def network_figures() -> dict[str, dict[str, float]]:
    """Return GFLOP and GB of one 512 px image through each network."""
    unet, vae = on_meta(full_size_unet), on_meta(full_size_autoencoder)
    text = on_meta(full_size_text_encoder)
    with torch.device("meta"):
        image, latents = torch.empty(1, 3, 512, 512), torch.empty(1, 4, 64, 64)
        tokens = torch.zeros(1, 77, dtype=torch.long)
    with torch.no_grad():
        figures = {
            "unet_forward": flops(lambda: unet(*unet_inputs(unet))),
            "vae_encode": flops(lambda: vae.encode(image)),
            "vae_decode": flops(lambda: vae.decode(latents)),  # pyright: ignore[reportArgumentType]
            "text": flops(lambda: text(tokens)),
        }
    figures["unet_full"] = flops(lambda: forward_backward(unet))
    gigabytes = {"state_full": state_bytes(unet), "state_full_ema": state_bytes(unet, True)}
    half = on_meta(full_size_unet).bfloat16()
    for name, checkpointed in (("activations", False), ("activations_checkpointed", True)):
        if checkpointed:
            half.enable_gradient_checkpointing()
            half.train()
        gigabytes[name] = activation_bytes(half, lambda: half(*unet_inputs(half)))
    unet.requires_grad_(False)
    add_lora_on_meta(unet, rank=4)
    figures["unet_lora"] = flops(lambda: forward_backward(unet))
    gigabytes["state_lora"] = state_bytes(unet)
    gigabytes["frozen"] = FLOAT32 * sum(p.numel() for n in (vae, text) for p in n.parameters())
    return {
        "gflop_per_image": {k: round(v / 1e9, 1) for k, v in figures.items()},
        "gigabytes": {k: round(v / 1e9, 2) for k, v in gigabytes.items()},
    }


def add_lora_on_meta(unet: UNet2DConditionModel, rank: int) -> None:
    """Add adapters that have no data either."""
    with torch.device("meta"):
        add_lora(unet, rank, seed=0)


def classifier_figures(backbone: str = "efficientnet_b0", size: int = 224) -> tuple[float, ...]:
    """Return the GFLOP and the GB of one image's training step, and the GB of the state."""
    network = on_meta(lambda: timm.create_model(backbone, num_classes=6))
    half = on_meta(lambda: timm.create_model(backbone, num_classes=6)).to(torch.bfloat16)
    with torch.device("meta"):
        image = torch.empty(2, 3, size, size)
    work = flops(lambda: network(image).sum().backward()) / 2e9
    kept = activation_bytes(half, lambda: half(image.to(torch.bfloat16))) / 2e9
    return work, kept, state_bytes(network) / 1e9


def estimate(tflops: float = 790.0, share: float = 0.4, epochs: int = 20) -> dict[str, Any]:
    """Work out the stages' hours, and the memory of each GPU with the shipped batch sizes.

    Args:
        tflops: Dense bf16 rate of one GPU in TFLOP/s; 790 is an H200's, 312 an A100's.
        share: Of that rate which is reached; 0.4 is assumed, not measured.
        epochs: Of classifier and fine-tuning, over 12,004 images.
    """
    figures = network_figures()
    gflop, held = figures["gflop_per_image"], figures["gigabytes"]
    work, activations, state = classifier_figures()
    tuning = held["state_full"] + BATCH["sd"] * held["activations"]
    # GFLOP of an image, GB of a GPU
    stages = {
        "classifier": (work, state + BATCH["classifier"] * activations),
        "fine-tuning, cached latents": (gflop["unet_full"], tuning),
        "fine-tuning, not cached": (
            gflop["unet_full"] + gflop["vae_encode"] + gflop["text"], tuning + held["frozen"]
        ),
        # 50 steps, both branches of guidance, once to sample and once to train
        "DDPO, LoRA": (
            100 * (gflop["unet_forward"] + gflop["unet_lora"]) + gflop["vae_decode"],
            held["state_lora"] + held["frozen"] + 2 * BATCH["ddpo"] * held["activations"],
        ),
    }  # fmt: skip
    images = {name: epochs * TRAIN_IMAGES for name in stages} | {"DDPO, LoRA": 100 * 256}
    rate = tflops * 1e3 * share
    return {
        "assumed": {"tflops": tflops, "share_of_rate": share, "scaling_over_gpus": 1.0},
        **figures,
        "stages": {
            name: {
                "images": images[name],
                "seconds_per_image": float(f"{work / rate:.3g}"),
                "hours": {
                    n: float(f"{work * images[name] / rate / 3600 / n:.2g}") for n in (1, 4, 8)
                },
                "gigabytes": round(gigabytes, 1),
            }
            for name, (work, gigabytes) in stages.items()
        },
    }


if __name__ == "__main__":
    print(json.dumps(auto_cli(estimate, as_positional=False), indent=2))
