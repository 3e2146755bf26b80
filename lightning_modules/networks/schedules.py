"""Learning rate over a run."""

from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

MIN_LR = 1e-6


def warmup_cosine(optimizer: Optimizer, steps: int, warmup: float = 0.0) -> LRScheduler:
    """Rise linearly from lr / 25 to lr, then fall along half a cosine to 1e-6.

    Args:
        optimizer: Its learning rate is the peak.
        steps: Optimizer steps of the whole run; the schedule is stepped once for each.
        warmup: Share of the steps that the rise takes, in [0, 1).
    """
    rise = round(warmup * steps)
    cosine = CosineAnnealingLR(optimizer, T_max=max(1, steps - rise), eta_min=MIN_LR)
    if rise == 0:
        return cosine
    linear = LinearLR(optimizer, start_factor=1 / 25, total_iters=rise)
    return SequentialLR(optimizer, [linear, cosine], milestones=[rise])
