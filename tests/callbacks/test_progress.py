import io
import itertools
import logging
import re
import sys
import time
import warnings
from copy import deepcopy

import pytest
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.data import DataLoader

from rl4med_ddpo.callbacks import progress as bars
from rl4med_ddpo.callbacks.progress import InnerProgressBar
from rl4med_ddpo.foundation.progress import progress
from support.policies import Policy, loader
from support.trainers import quiet_trainer


class Terminal(io.StringIO):
    def isatty(self):
        return True


def fit(path, monkeypatch, stdout, module=None, **options):
    monkeypatch.setattr(sys, "stdout", stdout)
    module = module or Policy()
    trainer = quiet_trainer(
        path, InnerProgressBar(), **{"max_epochs": 5, "enable_progress_bar": True} | options
    )
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
            shown = self.trainer.progress_bar_callback._inner
            positions = []
            for done in (1, 4, 5):
                progress.report("rollout", done, 5)
                positions.append((shown["rollout"].n, shown["rollout"].total))
            progress.report("update", 1, 2)
            positions.append(sorted(shown))
            progress.report("update", 2, 2)
            progress.report("update", 1, 3)
            positions.append((shown["update"].n, shown["update"].total))
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
                progress.report("rollout", done, 3)

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


def test_a_log_repeats_no_score_of_an_earlier_validation(tmp_path, monkeypatch, caplog):
    class Validated(Policy):
        def validation_step(self, batch, batch_idx):
            self.log("val/apr", 0.5, prog_bar=True)

    trainer = quiet_trainer(
        tmp_path, InnerProgressBar(), enable_progress_bar=True, max_epochs=3,
        check_val_every_n_epoch=2,
    )  # fmt: skip
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    with caplog.at_level("INFO", "lightning.pytorch"):
        trainer.fit(Validated(), loader(), loader())
    lines = [r.message for r in caplog.records if r.message.startswith("epoch")]
    assert ["val/apr 0.5" in line for line in lines] == [False, True, False]


def test_messages_and_warnings_stand_above_the_bars(tmp_path, monkeypatch):
    class Talking(Policy):
        def training_step(self, batch, batch_idx):
            progress.report("rollout", 1, 5)
            rank_zero_info("what is to be done")
            warnings.warn("what is wrong", stacklevel=1)

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    console = [logging.StreamHandler(screen)]
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "handlers", console)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        fit(tmp_path, monkeypatch, screen, Talking(), max_epochs=1)
    for text in ("what is to be done", "what is wrong"):
        line, *_ = [line for line in screen.getvalue().splitlines() if text in line]
        ahead = line.rpartition("\r")[2].partition(text)[0]
        assert "|" not in ahead, "on the line of a bar"


def test_a_log_of_a_long_step_gets_a_line_now_and_then(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(bars, "SECONDS_BETWEEN_LINES", 0.0)
    with caplog.at_level("INFO", "lightning.pytorch"):
        fit(tmp_path, monkeypatch, io.StringIO(), max_epochs=1)
    lines = [r.message for r in caplog.records if r.message.startswith("epoch 1: ")]
    assert lines[2] == "epoch 1: rollout 3/5"
    assert len(lines) == 7


def test_a_log_of_a_long_test_says_which_batch(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(bars, "SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    trainer = quiet_trainer(tmp_path, InnerProgressBar(), enable_progress_bar=True, max_epochs=5)
    with caplog.at_level("INFO", "lightning.pytorch"):
        trainer.test(Policy(), DataLoader(torch.zeros(3, 1)), verbose=False)
    lines = [r.message for r in caplog.records if r.message.startswith("test")]
    assert lines == [f"test, batch {i} of 3: sampling 1/1" for i in (1, 2, 3)]


@pytest.mark.parametrize("stdout", [Terminal(), io.StringIO()])
def test_nobody_listens_afterwards(tmp_path, monkeypatch, stdout):
    before = list(progress._listeners)
    module, trainer = fit(tmp_path, monkeypatch, stdout, max_epochs=1)
    assert progress._listeners == before
    trainer.test(module, loader(), verbose=False)
    assert progress._listeners == before


def test_nobody_listens_after_an_error(tmp_path, monkeypatch):
    before = list(progress._listeners)

    class Failing(Policy):
        def training_step(self, batch, batch_idx):
            assert progress._listeners != before
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        fit(tmp_path, monkeypatch, Terminal(), Failing())
    assert progress._listeners == before


def test_the_module_can_be_copied_while_it_reports(tmp_path, monkeypatch):
    class Copying(Policy):
        def training_step(self, batch, batch_idx):
            progress.report("rollout", 1, 2)
            self.copied = type(deepcopy(self)) is Copying

    assert fit(tmp_path, monkeypatch, Terminal(), Copying(), max_epochs=1)[0].copied


def test_what_has_no_length_moves_no_bar(tmp_path, monkeypatch):
    class Plain(Policy):
        def training_step(self, batch, batch_idx):
            progress.report("save.fsync")
            self.bars = dict(self.trainer.progress_bar_callback._inner)
            return self.optimizers().step()

    module, _ = fit(tmp_path, monkeypatch, Terminal(), Plain(), max_epochs=1)
    assert module.bars == {}
