"""What fine-tuning may change about the plain squared error of the predicted noise."""

from torch import Tensor


def min_snr_weights(alpha: Tensor, gamma: float) -> Tensor:
    """Weigh samples by min(SNR, gamma) / SNR: Min-SNR for noise prediction (Hang et al. 2023).

    Without it the nearly clean timesteps, whose SNR is large, weigh as much as all others though
    they teach little.

    Args:
        alpha: Cumulative alpha a of each sample's timestep, `(B,)` in (0, 1); SNR = a / (1 - a).
        gamma: Largest SNR that counts in full; 5 in the paper.
    """
    snr = alpha / (1 - alpha)
    return snr.clamp(max=gamma) / snr


def offset_noise(noise: Tensor, shift: Tensor, offset: float) -> Tensor:
    """Shift the noise of each sample's channels as a whole, so that its mean is learned as well.

    Args:
        noise: Standard normal, `(B, C, h, w)`.
        shift: Standard normal, `(B, C, 1, 1)`.
        offset: Size of the shift; 0.05 to 0.1 is usual.
    """
    return noise + offset * shift
