"""Tell which process this is before there is a trainer to ask."""

from lightning.fabric.plugins.environments import (
    LightningEnvironment,
    LSFEnvironment,
    MPIEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)

LAUNCHERS = (
    TorchElasticEnvironment,
    SLURMEnvironment,
    LSFEnvironment,
    MPIEnvironment,
)
"""Lightning's environments, in the order in which its trainer looks for them."""


def first_rank() -> int:
    """Return this process's rank as its launcher gives it; 0 for a process that nobody launched.

    Where the launcher gives no rank but a place (`NODE_RANK`, `LOCAL_RANK`), only 0 is exact.
    """
    for launcher in LAUNCHERS:
        if launcher.detect():
            return launcher().global_rank()
    plain = LightningEnvironment()
    return plain.node_rank() or plain.local_rank()
