"""Start an autoencoder as the linear codec of its images, in closed form.

A small convolutional autoencoder needs hours to find by gradient descent what principal component
analysis finds in seconds. Here every residual branch starts at zero, so that the network is a chain
of convolutions. Each one that halves the resolution takes the principal components of the 2 x 2
patches that come in; each one that doubles it is the least squares estimate of what the encoder
saw at that resolution.

The group normalisation at either end would lose brightness and contrast. A large constant channel
in each of its groups, the anchor, fixes the statistics that it divides by: it becomes affine.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

ANCHOR = 30.0
LINEAR_SILU = 4.0
"""Where SiLU is nearly linear for inputs of unit variance about it."""
RIDGE = 1e-5
CHUNK = 64
Coder = Any
"""An encoder or decoder of diffusers, which declares no types for their parts."""


@torch.no_grad()
def start_from_linear_codec(
    vae: AutoencoderKL, images: Tensor, log_variance: float = -6.0, whitening: float = 0.5
) -> None:
    """Set the weights of an autoencoder, in place.

    Args:
        vae: One residual block a level, each level with other channels than the one above.
        images: `(N, 3, S, S)` in [-1, 1]; some hundred are plenty.
        log_variance: Of the posterior, everywhere. The latents' own variance is 1 on average.
        whitening: Power of a component's deviation that its latent is divided by: 0 keeps the
            variances in proportion, 1 makes them equal.
    """
    _silence_residuals(vae)
    encoder: Coder = vae.encoder
    levels = _set_encoder(encoder, images)
    latents = levels[-1][:, : vae.config["latent_channels"]]
    latents = latents / _spread(latents)[:, None, None] ** whitening
    latents = latents / latents.square().mean().sqrt()
    _set_output(encoder, images, latents)
    encoder.conv_out.bias[latents.shape[1] :] = log_variance
    _pass(vae.quant_conv, range(2 * latents.shape[1]))
    _pass(vae.post_quant_conv, range(latents.shape[1]))
    encoded = torch.cat([vae.encode(x, return_dict=False)[0].mean for x in images.split(CHUNK)])
    _set_decoder(vae.decoder, encoded, levels[-2::-1])
    _set_output(vae.decoder, encoded, images)


@torch.no_grad()
def refit_output(vae: AutoencoderKL, images: Tensor) -> None:
    """Set the decoder's last convolution, in place, to the least squares estimate of images.

    Gradient descent leaves a slowly wandering cast of colour; this takes it away.

    Args:
        vae: A trained autoencoder.
        images: `(N, 3, S, S)` in [-1, 1]; some hundred are plenty.
    """
    parts = images.split(CHUNK)
    latents = torch.cat([vae.encode(x, return_dict=False)[0].sample() for x in parts])
    _set_output(vae.decoder, latents, images, kernel=3)


def _silence_residuals(vae: nn.Module) -> None:
    for name, parameter in vae.named_parameters():
        if name.rpartition(".")[0].endswith(("conv2", "to_out.0")):
            nn.init.zeros_(parameter)


def _set_encoder(encoder: Coder, images: Tensor) -> list[Tensor]:
    """Set all but the way out; return the images and what each level makes of the one above."""
    levels = [images]
    _pass(encoder.conv_in, range(3))
    *upper, deepest = encoder.down_blocks
    for block in upper:
        _pass(block.resnets[0].conv_shortcut, range(levels[-1].shape[1]))
        convolution = block.downsamplers[0].conv
        weight, bias = _principal_components(levels[-1], convolution.out_channels)
        nn.init.zeros_(convolution.weight)
        nn.init.zeros_(convolution.bias)
        convolution.weight[: len(weight), : weight.shape[1], :2, :2] = weight
        convolution.bias[: len(bias)] = bias
        levels.append(F.conv2d(levels[-1], weight, bias, stride=2))
    _pass_anchored(deepest.resnets[0].conv_shortcut, levels[-1], encoder.conv_norm_out)
    return levels


def _set_decoder(decoder: Coder, latents: Tensor, levels: list[Tensor]) -> None:
    """Set all but the way out, so that each level estimates the encoder's, deepest first."""
    _pass(decoder.conv_in, range(latents.shape[1]))
    *lower, last = decoder.up_blocks
    estimate = latents
    for block, target in zip(lower, levels, strict=True):
        _pass(block.resnets[0].conv_shortcut, range(estimate.shape[1]))
        convolution = block.upsamplers[0].conv
        upsampled = F.interpolate(estimate, scale_factor=2, mode="nearest")
        weight, bias = _least_squares(upsampled, target, kernel=3)
        convolution.weight[: len(weight)] = 0
        convolution.weight[: len(weight), : weight.shape[1]] = weight
        convolution.bias[: len(weight)] = bias
        estimate = F.conv2d(upsampled, weight, bias, padding=1)
    _pass_anchored(last.resnets[0].conv_shortcut, estimate, decoder.conv_norm_out)


def _set_output(coder: Coder, inputs: Tensor, target: Tensor, kernel: int = 1) -> None:
    """Set an encoder's or decoder's last convolution, 3 x 3, to estimate the target."""
    features = torch.cat([_last_features(coder, part) for part in inputs.split(CHUNK)])
    weight, bias = _least_squares(features, target, kernel)
    nn.init.zeros_(coder.conv_out.weight)
    nn.init.zeros_(coder.conv_out.bias)
    coder.conv_out.weight[: len(weight)] = F.pad(weight, [(3 - kernel) // 2] * 4)
    coder.conv_out.bias[: len(bias)] = bias


def _last_features(coder: Coder, inputs: Tensor) -> Tensor:
    seen: list[Tensor] = []
    hook = coder.conv_out.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    coder(inputs)
    hook.remove()
    return seen[0]


def _pass(convolution: nn.Conv2d | None, positions: Iterable[int]) -> None:
    """Let input channel i through to output channel `positions[i]`, and nothing besides."""
    if convolution is None:
        return
    middle = convolution.kernel_size[0] // 2
    assert convolution.bias is not None
    nn.init.zeros_(convolution.weight)
    nn.init.zeros_(convolution.bias)
    for source, position in enumerate(positions):
        convolution.weight[position, source, middle, middle] = 1


def _pass_anchored(convolution: nn.Conv2d, features: Tensor, norm: nn.GroupNorm) -> None:
    """Let features through, scaled to unit variance, to a normalisation with an anchor a group."""
    group = norm.num_channels // norm.num_groups
    free = [c for c in range(norm.num_channels) if c % group != group - 1]
    count = features.shape[1]
    assert count <= len(free), f"{count} channels and an anchor a group in {norm}"
    # taken in turns, so that the groups share the leading components
    _pass(convolution, sorted(free, key=lambda c: c % group)[:count])
    assert convolution.bias is not None
    convolution.weight[:, :count] /= _spread(features)[:, None, None]
    convolution.bias[group - 1 :: group] = ANCHOR
    nn.init.constant_(norm.weight, ANCHOR * (group - 1) ** 0.5 / group)
    nn.init.constant_(norm.bias, ANCHOR / group + LINEAR_SILU)


def _spread(features: Tensor) -> Tensor:
    """Return the standard deviation of each channel, `(C,)`."""
    return features.std((0, 2, 3))


def _principal_components(inputs: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return a 2 x 2 convolution to the leading components of patches, largest first.

    Args:
        inputs: `(N, C, H, W)`.
        count: Components at most, out of 4 C.

    Returns:
        Weight `(K, C, 2, 2)` and bias `(K,)`, so that each component has zero mean.
    """
    patches = F.pixel_unshuffle(inputs, 2).movedim(1, -1).flatten(0, 2)
    mean = patches.mean(0)
    centred = patches - mean
    variances, axes = torch.linalg.eigh(centred.T @ centred / len(centred))
    weight = axes[:, variances.argsort(descending=True)[:count]].T
    return weight.unflatten(1, (inputs.shape[1], 2, 2)), -weight @ mean


def _least_squares(inputs: Tensor, target: Tensor, kernel: int) -> tuple[Tensor, Tensor]:
    """Return the convolution, weight `(K, C, kernel, kernel)` and bias `(K,)`, of least error."""
    moments = products = torch.zeros((), dtype=torch.float64)
    for part, wanted in zip(inputs.split(CHUNK), target.split(CHUNK), strict=True):
        columns = F.unfold(part, kernel, padding=kernel // 2).movedim(1, -1).flatten(0, 1)
        columns = F.pad(columns, (0, 1), value=1.0)
        moments = moments + (columns.T @ columns).double()
        products = products + (columns.T @ wanted.movedim(1, -1).flatten(0, 2)).double()
    ridge = RIDGE * moments.diagonal().mean() * torch.eye(len(moments))
    solution = torch.linalg.solve(moments + ridge, products).float().T
    shape = (inputs.shape[1], kernel, kernel)
    return solution[:, :-1].unflatten(1, shape), solution[:, -1]
