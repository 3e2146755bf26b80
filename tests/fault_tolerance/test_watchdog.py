import re
import signal
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from rl4med_ddpo.fault_tolerance.watchdog import Watchdog
from rl4med_ddpo.foundation.errors import UserError
from support.command_line import ddpo, start_process
from support.forked import forked_ranks
from support.tiny_runs import fit

SECONDS_TO_END = 30.0


def watched(folder, policy, silence=3.0, limit=1800.0):
    fit(folder, policy, [Watchdog(silence, limit)], devices=2, strategy="ddp")


def alive_in_group(group):
    """List the processes of a group that run still."""
    alive = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, of_group = stat.read_text().rpartition(")")[2].split()[:3]
            if int(of_group) == group and state != "Z":
                alive.append(stat)
    return alive


def end_of(capfd):
    return "\n".join(capfd.readouterr().err.strip().splitlines()[-4:])


@pytest.mark.parametrize(
    ("fault", "phase", "codes"),
    [
        ("rollout:3:kill:1", "rollout", [1, -signal.SIGKILL]),
        ("update:3:kill:1", "update", [1, -signal.SIGKILL]),
        ("rollout:3:stop:1", "rollout", [1, -signal.SIGKILL]),
        ("rollout:3:kill:0", "rollout", [-signal.SIGKILL, 1]),
    ],
)
def test_a_dead_or_stopped_process_ends_the_run(
    policy, tmp_path, monkeypatch, capfd, fault, phase, codes
):
    monkeypatch.setenv("FAULT", fault)
    monkeypatch.setattr(sys, "argv", ["run.py", "fit", "--config", "ddpo.yaml", "--ckpt_path=x"])
    folder = tmp_path / "run"
    ended = forked_ranks(watched, folder, policy, limit=SECONDS_TO_END)
    # a stopped one is continued to write its stacks, and may finish before it is killed
    assert ended[:1] == codes[:1] if "stop" in fault else ended == codes
    said = end_of(capfd)
    lost = fault[-1]
    assert f"process {lost} of 2 was lost in the phase {phase}" in said
    assert f"Last checkpoint: {folder / 'checkpoints' / 'last.ckpt'}" in said
    assert said.endswith("To resume: python run.py fit --config ddpo.yaml")
    if "stop" in fault:
        stacks = (folder / "stacks" / "process_1.txt").read_text()
        assert "in training_step" in stacks
        assert "in collect" in stacks


def test_a_hung_process_ends_the_run(policy, tmp_path, monkeypatch, capfd):
    """Its watchdog is alive, its main thread is not."""
    monkeypatch.setenv("FAULT", "update:3:hang:1")
    run = partial(watched, limit=5.0)
    codes = forked_ranks(run, tmp_path / "run", policy, limit=SECONDS_TO_END)
    assert 0 not in codes
    assert re.search(r"process [01] of 2 was lost in the phase \w+: it did not move", end_of(capfd))
    assert "fault_point" in (tmp_path / "run" / "stacks" / "process_1.txt").read_text()


def test_the_watchdog_ends_with_the_run(policy, tmp_path):
    assert forked_ranks(watched, tmp_path / "run", policy) == [0, 0]
    assert not list((tmp_path / "run" / "stacks").iterdir())


def test_impossible_limits():
    with pytest.raises(UserError, match=r"silence=0\.1"):
        Watchdog(silence=0.1)


def test_the_real_command_line_leaves_no_orphan(tiny_pipeline, tiny_classifiers, tmp_path):
    """Process 1, which Lightning started, is killed; process 0 says so and ends."""
    process = start_process(
        tmp_path,
        *ddpo(tmp_path / "run", tiny_pipeline, tiny_classifiers),
        *("--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.max_epochs=500"),
        "--trainer.callbacks+=support.faults.Faults",
        FAULT="update:3:kill:1",
    )
    _, said = process.communicate(timeout=280)
    assert process.returncode == 1
    last = said.strip().splitlines()[-4:]
    assert "process 1 of 2 was lost in the phase" in last[0]
    assert "it was killed by SIGKILL" in last[0]
    assert last[3].startswith("  To resume: python ")
    assert "run.py fit --config=ddpo.yaml" in last[3]
    assert alive_in_group(process.pid) == []
