import os
import resource
import signal
import time
from functools import partial

import pytest
from lightning.pytorch.callbacks import Callback

from rl4med_ddpo.fault_tolerance.checkpoint_io import DurableCheckpointIO
from rl4med_ddpo.fault_tolerance.recovery import newest_whole
from rl4med_ddpo.fault_tolerance.watchdog import Watchdog
from support.forked import forked, forked_ranks
from support.tiny_runs import EPOCHS, differing, everything, fit


class DiskFillsUp(Callback):
    """From the second epoch on, no file can be larger than this."""

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))


def test_a_run_whose_disk_was_full_goes_on_when_there_is_room(policy, undisturbed, tmp_path, capfd):
    folder = tmp_path / "run"
    assert forked(fit, folder, policy, [DiskFillsUp()]) == 1
    said = capfd.readouterr().err
    assert f"cannot save the checkpoint {folder / 'checkpoints' / 'newest.ckpt'}" in said
    for part in ("File too large", "needed: about", "free on that disk"):
        assert part in said
    assert newest_whole(folder / "checkpoints").manifest.global_step == 2
    assert forked(fit, folder, policy) == 0
    assert differing(everything(folder), undisturbed) == []


def test_a_run_killed_after_its_last_save_gets_the_end_of_its_curves(policy, undisturbed, tmp_path):
    """Lightning logs an epoch after it was saved, and there is no further epoch."""
    folder, save = tmp_path / "run", DurableCheckpointIO.save_checkpoint

    def save_and_die(io, checkpoint, path, **options):
        save(io, checkpoint, path, **options)
        if checkpoint["epoch"] == EPOCHS - 1 and path.endswith("newest.ckpt"):
            os.kill(os.getpid(), signal.SIGKILL)

    def killed():
        DurableCheckpointIO.save_checkpoint = save_and_die
        fit(folder, policy)

    assert forked(killed) == -signal.SIGKILL
    for _ in range(2):
        assert forked(fit, folder, policy) == 0
        assert differing(everything(folder), undisturbed) == []


@pytest.fixture
def two_epochs(policy, tmp_path):
    """The folder of a run that has two checkpoints, and the newer of them."""
    assert forked(partial(fit, max_epochs=2), tmp_path / "run", policy) == 0
    return tmp_path / "run", tmp_path / "run" / "checkpoints" / "newest.ckpt"


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_run_goes_on_from_the_state_before_a_damaged_one(policy, undisturbed, two_epochs):
    folder, newest = two_epochs
    flip(newest)

    def warned():
        said = r"(?s)newest\.ckpt: its content is not what.*lost: 1 epoch \(rollouts, in DDPO\)"
        with pytest.warns(UserWarning, match=said):
            fit(folder, policy)

    assert forked(warned) == 0
    assert newest.with_name("newest.ckpt.corrupt").exists()
    assert differing(everything(folder), undisturbed) == []


def test_a_run_without_any_whole_checkpoint_does_not_begin_anew(policy, two_epochs, capfd):
    folder, newest = two_epochs
    for path in newest.parent.glob("*.ckpt"):
        path.write_bytes(path.read_bytes()[:1000])
    before = {p.name: p.read_bytes() for p in newest.parent.iterdir()}
    assert forked(fit, folder, policy) == 1
    said = capfd.readouterr().err
    for part in ("newest.ckpt: it has", "newest.previous.ckpt: it has", "--ckpt_path null"):
        assert part in said
    assert before == {p.name: p.read_bytes() for p in newest.parent.iterdir()}


def test_a_clock_that_is_set_back_does_not_matter(policy, undisturbed_on_two, tmp_path):
    """An hour, each time that anybody looks at it."""

    def set_back(folder):
        now = time.time()
        hours = iter(range(10**9))
        time.time = lambda: now - 3600 * next(hours)
        watchdog = Watchdog(silence=30.0, limit=60.0)
        fit(folder, policy, [watchdog], devices=2, strategy="ddp")

    assert forked_ranks(set_back, tmp_path / "run") == [0, 0]
    assert differing(everything(tmp_path / "run"), undisturbed_on_two) == []
