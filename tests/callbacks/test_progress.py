import io
import itertools
import re
import sys
import time
from copy import deepcopy

import pytest
import torch
from torch.utils.data import DataLoader

from rl4med_ddpo.callbacks import progress
from rl4med_ddpo.callbacks.progress import InnerProgressBar
from support.policies import Policy, loader, silent, trainer_of


class Terminal(io.StringIO):
    def isatty(self):
        return True


def fit(path, monkeypatch, stdout, module=None, **options):
    monkeypatch.setattr(sys, "stdout", stdout)
    module = module or Policy()
    trainer = trainer_of(path, InnerProgressBar(), enable_progress_bar=True, **options)
    trainer.fit(module, loader())
    return module, trainer


def test_a_terminal_sees_every_phase_move_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr("tqdm.std.tqdm.monitor_interval", 0)
    terminal = Terminal()
    fit(tmp_path, monkeypatch, terminal, max_epochs=2)
    shown = terminal.getvalue()
    assert "Epoch 1" in shown
    assert re.search(r"rollout:.* 0/5 ", shown)
    assert re.search(r"update:.* 0/2 ", shown)


def test_bars_follow_their_reports(tmp_path, monkeypatch):
    class Watching(Policy):
        def training_step(self, batch, batch_idx):
            bars = self.trainer.progress_bar_callback._inner
            positions = []
            for done in (1, 4, 5):
                self.report_progress("rollout", done, 5)
                positions.append((bars["rollout"].n, bars["rollout"].total))
            self.report_progress("update", 1, 2)
            positions.append(sorted(bars))
            self.report_progress("update", 2, 2)
            self.report_progress("update", 1, 3)
            positions.append((bars["update"].n, bars["update"].total))
            self.positions = positions

    module, trainer = fit(tmp_path, monkeypatch, Terminal(), Watching(), max_epochs=1)
    assert module.positions == [(1, 5), (4, 5), (5, 5), ["update"], (1, 3)]
    assert trainer.progress_bar_callback._inner == {}


def test_a_clock_that_is_set_back_does_not_stop_the_bars(tmp_path, monkeypatch):
    """tqdm draws, and counts what is left, by the time since it last drew."""
    now, looks = time.time(), itertools.count()
    monkeypatch.setattr("tqdm.std.time", lambda: now - 3600 * next(looks))
    monkeypatch.setattr("tqdm.std.tqdm.monitor_interval", 0)

    class Slow(Policy):
        def training_step(self, batch, batch_idx):
            for done in range(1, 4):
                time.sleep(0.15)
                self.report_progress("rollout", done, 3)

    terminal = Terminal()
    fit(tmp_path, monkeypatch, terminal, Slow(), max_epochs=2)
    shown = terminal.getvalue()
    assert re.search(r"rollout:.* 2/3 \[00:00<00:0\d", shown)
    assert re.search(r"Epoch 1: 100%.* 1/1 \[00:0\d<00:0\d", shown)


def test_a_log_gets_one_line_an_epoch_with_the_metrics(tmp_path, monkeypatch, caplog):
    stdout = io.StringIO()
    with caplog.at_level("INFO", "lightning.pytorch"):
        fit(tmp_path, monkeypatch, stdout, max_epochs=3)
    lines = [r.message for r in caplog.records if r.message.startswith("epoch")]
    assert lines == [f"epoch {i} done, reward/mean 0.25" for i in (1, 2, 3)]
    assert "\r" not in stdout.getvalue()


def test_a_log_of_a_long_step_gets_a_line_now_and_then(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    with caplog.at_level("INFO", "lightning.pytorch"):
        fit(tmp_path, monkeypatch, io.StringIO(), max_epochs=1)
    lines = [r.message for r in caplog.records if r.message.startswith("epoch 1: ")]
    assert lines[2] == "epoch 1: rollout 3/5"
    assert len(lines) == 7


def test_a_log_of_a_long_test_says_which_batch(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    trainer = trainer_of(tmp_path, InnerProgressBar(), enable_progress_bar=True)
    with caplog.at_level("INFO", "lightning.pytorch"):
        trainer.test(Policy(), DataLoader(torch.zeros(3, 1)), verbose=False)
    lines = [r.message for r in caplog.records if r.message.startswith("test")]
    assert lines == [f"test, batch {i} of 3: sampling 1/1" for i in (1, 2, 3)]


@pytest.mark.parametrize("stdout", [Terminal(), io.StringIO()])
def test_the_module_is_silent_again_afterwards(tmp_path, monkeypatch, stdout):
    module, trainer = fit(tmp_path, monkeypatch, stdout, max_epochs=1)
    assert module.report_progress is silent
    trainer.test(module, loader(), verbose=False)
    assert module.report_progress is silent


def test_the_module_is_silent_again_after_an_error(tmp_path, monkeypatch):
    class Failing(Policy):
        def training_step(self, batch, batch_idx):
            assert self.report_progress is not silent
            raise RuntimeError("out of memory")

    module = Failing()
    with pytest.raises(RuntimeError, match="out of memory"):
        fit(tmp_path, monkeypatch, Terminal(), module)
    assert module.report_progress is silent


def test_the_module_can_be_copied_while_it_reports(tmp_path, monkeypatch):
    class Copying(Policy):
        def training_step(self, batch, batch_idx):
            self.report_progress("rollout", 1, 2)
            self.copied = deepcopy(self.__dict__["report_progress"]) is self.report_progress

    assert fit(tmp_path, monkeypatch, Terminal(), Copying(), max_epochs=1)[0].copied


def test_a_module_that_does_not_report_is_left_alone(tmp_path, monkeypatch):
    class Plain(Policy):
        report_progress = None

        def training_step(self, batch, batch_idx):
            return self.optimizers().step()

    del Plain.report_progress
    monkeypatch.delattr(Policy, "report_progress")
    module, _ = fit(tmp_path, monkeypatch, Terminal(), Plain(), max_epochs=1)
    assert not hasattr(module, "report_progress")
