from functools import partial

import pytest
from forked import forked, forked_ranks
from runs import differing, everything, fit, fit_on_two, last, loaded_ddpo


@pytest.fixture(scope="module")
def policy(tiny_pipeline, tiny_classifiers):
    return loaded_ddpo(tiny_pipeline, tiny_classifiers)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def undisturbed(policy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert forked(fit, folder, policy) == 0
    return everything(folder)


@pytest.fixture(scope="module")
def undisturbed_on_two(policy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "two"
    assert forked_ranks(fit_on_two, folder, policy) == [0, 0]
    return everything(folder)


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
    assert "To go on: python" in last_line(capfd)
    monkeypatch.delenv("FAULT")
    assert forked(fit, folder, policy) == 0
    assert differing(everything(folder), undisturbed) == []


@pytest.mark.parametrize(
    "fault",
    [
        "rollout:1:term:1",
        "rollout:4:usr1:1",
        "rollout:3:term:0",
        "rollout:3:term",
        "update:2:term:1",
        "update:3:usr1:0",
        "reward:2:term:1",
        "save.write:9:term:0",
        "save.replace:4:usr1:0",
    ],
)
def test_a_signal_to_any_process_ends_all_with_one_checkpoint(
    policy, undisturbed_on_two, tmp_path, monkeypatch, capfd, fault
):
    folder = tmp_path / "run"
    monkeypatch.setenv("FAULT", fault)
    code = 143 if "term" in fault else 138
    assert forked_ranks(fit_on_two, folder, policy) == [code, code]
    assert "To go on: python" in last_line(capfd)
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
