import ast
import errno
import json
import os
import signal
import socket
import stat
import time

import pytest

from rl4med_ddpo.fault_tolerance import run_folder
from rl4med_ddpo.fault_tolerance.checkpoint_io import DurableCheckpointIO
from rl4med_ddpo.fault_tolerance.run_folder import claim
from rl4med_ddpo.foundation.errors import UserError
from support.command_line import ROOT, ddpo, in_process
from support.forked import forked

NOTHING_PREPARED = ("no/pipeline", {"reward": "no/reward.ckpt", "judge": "no/judge.ckpt"})


def refused(folder, *more):
    """What the command line answers; that nothing else is prepared it has not yet noticed."""
    started = time.monotonic()
    with pytest.raises(UserError) as error:
        in_process(*ddpo(folder, *NOTHING_PREPARED, *more))
    assert time.monotonic() - started < 10
    assert str(folder) in str(error.value)
    assert "--trainer.default_root_dir" in str(error.value)
    return str(error.value)


def test_a_run_folder_that_is_a_file(tmp_path):
    (tmp_path / "run").write_text("a file")
    assert "cannot be written" in refused(tmp_path / "run")


def test_a_run_folder_in_a_loop_of_links(tmp_path):
    (tmp_path / "run").symlink_to(tmp_path / "other")
    (tmp_path / "other").symlink_to(tmp_path / "run")
    assert "cannot be written" in refused(tmp_path / "run")


def test_a_run_folder_without_permission(tmp_path):
    if os.getuid():
        pytest.skip("only root can become nobody")
    read, write = os.pipe()

    def as_nobody():
        os.setuid(65534)
        try:
            claim(tmp_path / "run", "fit")
        except UserError as error:
            os.write(write, str(error).encode())
            os._exit(2)

    tmp_path.chmod(0o555)
    assert forked(as_nobody) == 2
    message = os.read(read, 10_000).decode()
    assert "Permission denied" in message
    assert str(tmp_path / "run") in message


def test_a_full_disk_is_noticed_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "LEAST_FREE", 10**18)
    message = refused(tmp_path / "run")
    assert "are free" in message
    assert "1,000,000,000,000,000,000" in message


def test_checkpoints_that_will_not_fit_are_refused_before_the_first_step(
    tiny_pipeline, tiny_classifiers, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    free = run_folder.shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(run_folder, "LEAST_FREE", 0)
    monkeypatch.setattr(run_folder.shutil, "disk_usage", lambda path: free)
    with pytest.raises(UserError, match="1,000,000 bytes free; the checkpoints") as error:
        in_process(*ddpo(tmp_path / "run", tiny_pipeline, tiny_classifiers, "--model.train=full"))
    assert str(tmp_path / "run" / "checkpoints") in str(error.value)
    assert not list((tmp_path / "run" / "checkpoints").glob("*.ckpt"))


@pytest.fixture
def holder(tmp_path):
    """Another process, in whose hands the folder is."""
    ready, tell = os.pipe()
    child = os.fork()
    if not child:
        claim(tmp_path / "run", "fit")
        os.write(tell, b"x")
        time.sleep(60)
        os._exit(0)
    os.read(ready, 1)
    yield child
    try:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    except (ProcessLookupError, ChildProcessError):
        pass


def test_a_second_run_in_a_folder_is_refused(tmp_path, holder):
    message = refused(tmp_path / "run")
    assert f"process {holder} on host {socket.gethostname()}" in message


@pytest.mark.parametrize(
    "place",
    [
        {"NODE_RANK": "1"},
        {"GROUP_RANK": "1", "LOCAL_RANK": "0"},
        {"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "1"},
        {
            "SLURM_NTASKS": "4",
            "SLURM_NTASKS_PER_NODE": "2",
            "SLURM_JOB_NAME": "train",
            "SLURM_PROCID": "2",
        },
    ],
)
def test_the_other_nodes_of_a_run_are_no_second_run(tmp_path, holder, monkeypatch, place):
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"no/reward\.ckpt") as error:
        in_process(*ddpo(tmp_path / "run", *NOTHING_PREPARED))
    assert "in use" not in str(error.value)


@pytest.fixture
def poor_file_system(monkeypatch):
    """A file system with neither locks nor synced folders, as some network mounts are."""
    fsync = os.fsync

    def no_locks(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    def fsync_of_files(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(descriptor)

    monkeypatch.setattr("fcntl.lockf", no_locks)
    monkeypatch.setattr("os.fsync", fsync_of_files)


@pytest.mark.parametrize("config", ["ddpo.yaml", "classifier.yaml", "sd.yaml"])
def test_what_a_file_system_lacks_is_named_at_the_start(tmp_path, poor_file_system, config):
    run = f"--trainer.default_root_dir={tmp_path / 'run'}"
    with pytest.raises(UserError) as error:
        in_process("fit", f"--config={config}", run, "--trainer.accelerator=cpu")
    for part in (
        "locks ([Errno 38] Function not implemented)",
        "syncing a folder ([Errno 22] Invalid argument)",
        str(tmp_path / "run"),
        "--run_folder.unprotected=true",
    ):
        assert part in str(error.value)
    assert "in use" not in str(error.value)


def test_a_run_goes_on_without_what_its_file_system_lacks(
    tiny_pipeline, tiny_classifiers, tmp_path, poor_file_system, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    args = ddpo(tmp_path / "run", tiny_pipeline, tiny_classifiers, "--trainer.max_epochs=1")
    with pytest.warns(UserWarning, match="lacks what protects a run"):
        in_process(*args, "--model.steps=2", "--run_folder.unprotected=true")
    saved = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert DurableCheckpointIO().load_checkpoint(saved)["global_step"] == 2


def test_another_command_may_use_the_folder(tmp_path, holder):
    claim(tmp_path / "run", "test")


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path, holder):
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    lock = tmp_path / "run" / ".fit.lock"
    assert json.loads(lock.read_text())["pid"] == holder
    claim(tmp_path / "run", "fit")
    assert json.loads(lock.read_text())["pid"] == os.getpid()


def test_the_folder_can_be_claimed_again_by_the_same_process(tmp_path):
    claim(tmp_path / "run", "fit")
    claim(tmp_path / "run", "fit")
    assert forked(claim, tmp_path / "run", "fit") == 1


def test_nothing_depends_on_the_clock_of_the_day():
    """It can be set back in the middle of a run; `time.monotonic` cannot."""
    for path in ROOT.rglob("*.py"):
        if "tests" in path.parts or ".venv" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                called = f"{node.value.id}.{node.attr}"
                assert called not in ("time.time", "datetime.now", "datetime.utcnow"), path
