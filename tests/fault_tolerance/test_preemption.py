import signal
import time
from functools import partial

import lightning as L
import pytest
from torch.utils.data import DataLoader

from rl4med_ddpo.fault_tolerance.preemption import Preemption
from support.forked import forked, forked_ranks
from support.tiny_runs import differing, everything, fit, fit_on_two, last
from support.trainers import quiet_trainer

SECONDS_TO_END = 15.0


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def last_line(capfd):
    return capfd.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ("rollout:1:term", 143),
        ("rollout:4:usr1", 138),
        ("update:3:term", 143),
        ("sampling:4:term", 143),
        ("save.write:9:term", 143),
        ("save.manifest:2:usr1", 138),
    ],
)
def test_a_preempted_run_goes_on_as_if_it_had_not_been(
    policy, undisturbed, tmp_path, monkeypatch, capfd, fault, code
):
    folder = tmp_path / "run"
    monkeypatch.setenv("FAULT", fault)
    assert forked(fit, folder, policy) == code
    assert "To resume: python" in last_line(capfd)
    monkeypatch.delenv("FAULT")
    assert forked(fit, folder, policy) == 0
    assert differing(everything(folder), undisturbed) == []


@pytest.mark.parametrize(
    ("where", "signalled", "every_n_epochs"),
    [
        ("rollout:1:stop:1", signal.SIGTERM, 1),
        ("rollout:6:stop:1", signal.SIGUSR1, 10),
        ("rollout:5:stop", signal.SIGTERM, 10),
        ("update:2:stop:1", signal.SIGTERM, 1),
        ("update:5:stop:0", signal.SIGUSR1, 10),
        ("reward:3:stop:1", signal.SIGTERM, 10),
        ("save.write:9:stop:0", signal.SIGTERM, 1),
        ("save.replace:4:stop:0", signal.SIGUSR1, 1),
    ],
)
def test_a_signal_to_any_process_ends_all_with_one_checkpoint(
    policy, undisturbed_on_two, tmp_path, monkeypatch, capfd, where, signalled, every_n_epochs
):
    """The processes named stop there, get the signal from outside, and go on.

    With a checkpoint every 10 epochs, that of the best epoch, the first, is the only one before.
    """
    folder, run = tmp_path / "run", partial(fit_on_two, every_n_epochs=every_n_epochs)
    monkeypatch.setenv("FAULT", where)
    codes = forked_ranks(run, folder, policy, limit=SECONDS_TO_END, stopped_get=signalled)
    assert codes == [128 + signalled] * 2
    assert "To resume: python" in last_line(capfd)
    if every_n_epochs == 10:
        assert {p.name for p in folder.glob("checkpoints/*")} == {
            "best.ckpt", "best.ckpt.json", "last.ckpt", "last.ckpt.json",
        }  # fmt: skip
    monkeypatch.delenv("FAULT")
    assert forked_ranks(fit_on_two, folder, policy) == [0, 0]
    assert differing(everything(folder), undisturbed_on_two) == []


@pytest.mark.parametrize("fault", ["rollout:5:term", "update:5:term", "sampling:7:term"])
def test_what_no_checkpoint_holds_yet_is_saved(
    policy, undisturbed, tmp_path, monkeypatch, capfd, fault
):
    """With a checkpoint every 10 epochs, the state before the interrupted epoch is kept."""
    folder = tmp_path / "run"
    monkeypatch.setenv("FAULT", fault)
    assert forked(partial(fit, every_n_epochs=10), folder, policy) == 143
    assert f"Saved {folder / 'checkpoints' / 'last.ckpt'}" in last_line(capfd)
    assert last(folder)["global_step"] in (2, 4)
    monkeypatch.delenv("FAULT")
    assert forked(fit, folder, policy) == 0
    assert differing(everything(folder), undisturbed) == []


class DrawsInTurn(L.LightningModule):
    """Draws every second batch, and asks for company: the other process has to draw as well."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def predict_step(self, batch, batch_idx):
        if batch_idx % 2 != self.global_rank:
            return
        (self.folder / f"{batch_idx}").touch()
        other, until = self.folder / f"{batch_idx ^ 1}", time.monotonic() + 20
        while not other.exists():
            assert time.monotonic() < until, f"no process draws {other.name} beside {batch_idx}"
            time.sleep(0.01)

    test_step = predict_step


@pytest.mark.parametrize("job", ["predict", "test"])
def test_no_process_waits_while_another_draws(tmp_path, job):
    def draw():
        options = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False}
        trainer = quiet_trainer(tmp_path, callbacks=[Preemption()], **options)
        getattr(trainer, job)(DrawsInTurn(tmp_path), DataLoader(range(6)))

    assert forked_ranks(draw) == [0, 0]
    assert len(list(tmp_path.glob("[0-5]"))) == 6


class Idle(L.LightningModule):
    def training_step(self, batch, batch_idx):
        return None

    def validation_step(self, batch, batch_idx):
        return None

    def configure_optimizers(self):
        return None


def test_validation_may_be_set_by_the_clock(tmp_path):
    interval = {"val_check_interval": "00:00:30:00", "max_epochs": 1}
    trainer = quiet_trainer(tmp_path, callbacks=[Preemption()], **interval)
    trainer.fit(Idle(), DataLoader(range(3)), DataLoader(range(1)))
    assert trainer.current_epoch == 1


def test_a_second_signal_leaves_at_once_and_whole(policy, undisturbed, tmp_path, monkeypatch):
    """The first asks for a save, and the second comes while that is written."""
    folder = tmp_path / "run"
    monkeypatch.setenv("FAULT", "rollout:5:term,save.fsync:2:term")
    assert forked(partial(fit, every_n_epochs=10), folder, policy) == 143
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {
        "best.ckpt", "best.ckpt.json", "last.ckpt.part",
    }  # fmt: skip
    # the best was saved in the validation of the first epoch
    monkeypatch.setenv("FAULT", "rollout:3:term")
    assert forked(partial(fit, every_n_epochs=10), folder, policy) == 143
    assert last(folder)["global_step"] == 4
    monkeypatch.delenv("FAULT")
    assert forked(fit, folder, policy) == 0
    assert differing(everything(folder), undisturbed) == []
