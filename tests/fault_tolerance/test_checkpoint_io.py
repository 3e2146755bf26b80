import os
import resource
import shutil
import signal
import tempfile

import pytest
import torch
from lightning.fabric.plugins import TorchCheckpointIO

from rl4med_ddpo.fault_tolerance.checkpoint_io import DurableCheckpointIO
from rl4med_ddpo.fault_tolerance.recovery import newest_whole
from rl4med_ddpo.foundation.errors import UserError
from rl4med_ddpo.foundation.progress import progress
from support import faults
from support.forked import forked

OTHER_DISK = "/dev/shm"


def state(step):
    """A checkpoint with a tensor, an optimizer's plain values, and a big tensor."""
    draw = torch.Generator().manual_seed(step)
    return {
        "epoch": step,
        "global_step": step,
        "state_dict": {"weight": torch.randn(70_000, generator=draw)},
        "optimizer_states": [{"step": step, "betas": (0.9, 0.999)}],
    }


def save(folder, step, name="newest.ckpt"):
    """Save as ModelCheckpoint does: the file, then the link to it."""
    DurableCheckpointIO().save_checkpoint(state(step), folder / name)
    link = folder / "last.ckpt"
    link.unlink(missing_ok=True)
    link.symlink_to(name)


def loaded(path):
    return DurableCheckpointIO().load_checkpoint(path)


def assert_state(checkpoint, step):
    expected = state(step)
    assert torch.equal(checkpoint["state_dict"]["weight"], expected["state_dict"]["weight"])
    assert checkpoint["optimizer_states"] == expected["optimizer_states"]
    assert (checkpoint["epoch"], checkpoint["global_step"]) == (step, step)


@pytest.fixture
def folder(tmp_path):
    """Two saves have been made."""
    save(tmp_path, 1)
    save(tmp_path, 2)
    return tmp_path


def passes(point):
    """How often one save passes a point."""
    return {"save.write": 6, "save.fsync": 1, "save.replace": 3, "save.manifest": 2}[point]


EVERY_POINT = [
    (point, n)
    for point in ("save.write", "save.fsync", "save.replace", "save.manifest")
    for n in range(1, passes(point) + 1)
]


def test_the_list_of_points_is_complete(folder):
    """One save passes each point as often as the trials below kill it there."""
    seen = []
    note = lambda point, done, total: seen.append(point)  # noqa: E731
    progress.subscribe(note)
    save(folder, 3)
    progress.unsubscribe(note)
    for point in ("save.fsync", "save.replace", "save.manifest"):
        assert seen.count(point) == passes(point)
    assert seen.count("save.write") >= passes("save.write")


@pytest.mark.parametrize("scratch", ["same disk", "another disk"])
@pytest.mark.parametrize(("point", "n"), EVERY_POINT)
def test_a_kill_at_any_point_of_a_save_leaves_the_old_or_the_new_state(
    folder, monkeypatch, point, n, scratch
):
    if scratch == "another disk":
        if os.stat(OTHER_DISK).st_dev == os.stat(folder).st_dev:
            pytest.skip(f"{OTHER_DISK} is no file system of its own here")
        monkeypatch.setenv("TMPDIR", OTHER_DISK)
    monkeypatch.setenv("FAULT", f"{point}:{n}:kill")
    assert forked(save, folder, 3) == -signal.SIGKILL
    monkeypatch.delenv("FAULT")

    found = newest_whole(folder)
    assert found.manifest.global_step in (2, 3)
    assert_state(loaded(found.path), found.manifest.global_step)
    assert not list(folder.glob("*.part*"))
    # and the next save works as if nothing had happened
    save(folder, 4)
    assert newest_whole(folder).manifest.global_step == 4
    assert_state(loaded(folder / "last.ckpt"), 4)


@pytest.mark.parametrize(("point", "n"), EVERY_POINT)
def test_a_kill_in_the_first_save_of_all_keeps_no_half_of_it(tmp_path, monkeypatch, point, n):
    """There is nothing to go back to; the run goes on or begins again by itself."""
    if (point, n) == ("save.replace", 3):
        pytest.skip("there is nothing to put aside")
    monkeypatch.setenv("FAULT", f"{point}:{n}:kill")
    assert forked(save, tmp_path, 1) == -signal.SIGKILL
    monkeypatch.delenv("FAULT")
    found = newest_whole(tmp_path)
    assert (found is not None) == ((point, n) == ("save.manifest", 2))
    if found:
        assert_state(loaded(found.path), 1)
    save(tmp_path, 2)
    assert_state(loaded(newest_whole(tmp_path).path), 2)


@pytest.mark.parametrize("n", [1, 2])
def test_a_kill_while_an_old_checkpoint_is_removed(folder, monkeypatch, n):
    DurableCheckpointIO().save_checkpoint(state(1), folder / "best.ckpt")
    monkeypatch.setenv("FAULT", f"prune:{n}:kill")
    remove = DurableCheckpointIO().remove_checkpoint
    assert forked(remove, folder / "best.ckpt") == -signal.SIGKILL
    found = newest_whole(folder)
    assert_state(loaded(found.path), 2)
    left = {p.name for p in folder.glob("best*")}
    assert left == (set() if n == 2 else {"best.ckpt", "best.ckpt.json"})


def test_two_states_are_kept_and_the_best_is_not_doubled(folder):
    DurableCheckpointIO().save_checkpoint(state(1), folder / "best.ckpt")
    DurableCheckpointIO().save_checkpoint(state(2), folder / "best.ckpt")
    assert {p.name for p in folder.glob("*.ckpt")} == {
        "newest.ckpt", "newest.previous.ckpt", "last.ckpt", "best.ckpt",
    }  # fmt: skip
    assert_state(loaded(folder / "newest.previous.ckpt"), 1)


@pytest.mark.parametrize("limit", [0, 100_000, 279_000])
def test_a_full_disk_is_reported_and_the_states_before_are_whole(folder, limit):
    read, write = os.pipe()

    def full():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            save(folder, 3)
        except UserError as error:
            os.write(write, str(error).encode())
            os._exit(2)

    assert forked(full) == 2
    message = os.read(read, 10_000).decode()
    assert str(folder / "newest.ckpt") in message
    assert "File too large" in message
    assert "280,000 bytes" in message
    assert "free on that disk" in message
    assert not list(folder.glob("*.part"))
    found = newest_whole(folder)
    assert found.manifest.global_step == 2
    assert_state(loaded(found.path), 2)
    save(folder, 3)
    assert_state(loaded(folder / "last.ckpt"), 3)


def test_a_disk_that_fills_up_while_syncing(folder, monkeypatch):
    monkeypatch.setenv("FAULT", "save.write:2:enospc")
    monkeypatch.setattr(faults, "_passed", faults.Counter())
    with pytest.raises(UserError, match="No space left on device"):
        save(folder, 3)
    assert newest_whole(folder).manifest.global_step == 2


def test_an_unwritable_folder_is_an_error_and_not_silence(folder):
    if os.getuid():
        pytest.skip("only root can become nobody")
    read, write = os.pipe()
    folder.chmod(0o755)

    def as_nobody():
        os.setuid(65534)
        try:
            DurableCheckpointIO().save_checkpoint(state(3), folder / "newest.ckpt")
        except UserError as error:
            os.write(write, str(error).encode())
            os._exit(2)

    # pytest's folders are for their owner alone
    for parent in folder.parents:
        if parent.stat().st_uid == os.getuid() and parent.name.startswith(("pytest", "popen")):
            parent.chmod(0o755)
    assert forked(as_nobody) == 2
    assert "Permission denied" in os.read(read, 10_000).decode()
    assert newest_whole(folder).manifest.global_step == 2


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def empty(path):
    path.write_bytes(b"")


def without_manifest(path):
    (path.parent / f"{path.name}.json").unlink()


DAMAGES = {cut: "bytes", flip: "sha256", empty: "has 0 bytes", without_manifest: "no manifest"}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.__name__)
def test_a_damaged_newest_gives_way_to_the_one_before(folder, damage):
    damage(folder / "newest.ckpt")
    with pytest.warns(UserWarning, match="damaged checkpoint") as said:
        found = newest_whole(folder)
    message = str(said[0].message)
    assert "newest.ckpt: " in message
    assert DAMAGES[damage] in message
    if damage is not without_manifest:
        assert "lost: 1 epoch" in message
    assert found.path.name == "newest.previous.ckpt"
    assert_state(loaded(found.path), 1)
    assert (folder / "newest.ckpt.corrupt").exists()
    assert not (folder / "newest.ckpt").exists()


def test_all_damaged_lists_each_and_changes_nothing(folder):
    flip(folder / "newest.ckpt")
    cut(folder / "newest.previous.ckpt")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(UserError, match="cannot resume: every checkpoint") as error:
        newest_whole(folder)
    for part in ("newest.ckpt: its content", "newest.previous.ckpt: it has", "--ckpt_path null"):
        assert part in str(error.value)
    assert before == {p.name: p.read_bytes() for p in folder.iterdir()}


def test_a_checkpoint_of_a_validation_is_no_place_to_go_on_from(folder):
    DurableCheckpointIO().save_checkpoint(
        state(3) | {"run": {"between_steps": False}}, folder / "best.ckpt"
    )
    assert newest_whole(folder).manifest.global_step == 2


def test_lightning_itself_loses_the_state_across_disks(tmp_path, monkeypatch):
    """Should this fail one day, our own checkpoint IO can go."""
    if os.stat(OTHER_DISK).st_dev == os.stat(tmp_path).st_dev:
        pytest.skip(f"{OTHER_DISK} is no file system of its own here")
    path = tmp_path / "last.ckpt"
    TorchCheckpointIO().save_checkpoint(state(1), path)

    def dies_while_copying(source, target, **_):
        with open(source, "rb") as whole, open(target, "wb") as half:
            half.write(whole.read(65_536))
            half.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    def save_again():
        monkeypatch.setattr(tempfile, "tempdir", OTHER_DISK)
        monkeypatch.setattr(shutil, "copyfile", dies_while_copying)
        TorchCheckpointIO().save_checkpoint(state(2), path)

    assert forked(save_again) == -signal.SIGKILL
    with pytest.raises((RuntimeError, OSError)):
        torch.load(path, weights_only=True)
