import signal
from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging

from rl4med_ddpo.datamodules.dermoscopy import DermoscopyFolder
from rl4med_ddpo.datamodules.isic import ISICDataModule
from rl4med_ddpo.lightning_modules import AttributeClassifier
from support.command_line import ddpo, in_process, start_process
from support.forked import forked, forked_ranks
from support.tiny import distance
from support.tiny_runs import (
    curves,
    differing,
    everything,
    fit,
    fit_on_two,
    last,
    loaded_ddpo,
    trainer_of,
)


@pytest.fixture(scope="module")
def isic(tmp_path_factory):
    root = tmp_path_factory.mktemp("isic") / "data"
    DermoscopyFolder(root, images=64, size=16, combinations="balanced").write()
    return root


def fit_classifier(folder, isic, num_workers=0, **options):
    """Eleven batches in two epochs, with dropout, which draws from the global generator."""
    torch.manual_seed(0)
    module = AttributeClassifier("test_efficientnet", False, image_size=32, dropout=0.3)
    data = ISICDataModule(str(isic), size=16, batch_size=8, num_workers=num_workers)
    trainer_of(folder, max_epochs=2, **options).fit(module, datamodule=data)


@pytest.fixture(autouse=True)
def seeded(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")


@pytest.fixture(scope="module")
def undisturbed(isic, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PL_GLOBAL_SEED", "5")
        assert forked(fit_classifier, folder, isic) == 0
    return everything(folder)


@pytest.mark.parametrize(
    ("fault", "num_workers"),
    [("batch:4:term", 0), ("batch:8:usr1", 2), ("batch:9:term", 0), ("batch:5:kill", 2)],
)
def test_a_classifier_stopped_within_an_epoch_goes_on_with_the_next_batch(
    isic, undisturbed, tmp_path, monkeypatch, fault, num_workers
):
    """And with worker processes as without."""
    folder = tmp_path / "run"
    monkeypatch.setenv("FAULT", fault)
    code = {"term": 143, "usr1": 138, "kill": -9}[fault.rpartition(":")[2]]
    assert forked(fit_classifier, folder, isic, num_workers) == code
    if code > 0:
        assert last(folder)["global_step"] == int(fault.split(":")[1]) - 1
    monkeypatch.delenv("FAULT")
    assert forked(fit_classifier, folder, isic, num_workers) == 0
    assert differing(everything(folder), undisturbed) == []


def test_averaged_weights_go_on_too(isic, tmp_path, monkeypatch):
    def averaged(folder):
        ema = EMAWeightAveraging(decay=0.9, update_starting_at_step=1)
        fit_classifier(folder, isic, callbacks=[ema])

    assert forked(averaged, tmp_path / "undisturbed") == 0
    monkeypatch.setenv("FAULT", "batch:8:term")
    assert forked(averaged, tmp_path / "run") == 143
    assert "current_model_state" in last(tmp_path / "run")
    monkeypatch.delenv("FAULT")
    assert forked(averaged, tmp_path / "run") == 0
    assert differing(everything(tmp_path / "run"), everything(tmp_path / "undisturbed")) == []


@pytest.fixture(scope="module")
def with_all(tiny_pipeline, tiny_classifiers):
    """Two inner epochs with the divergence from the start, on adapters."""
    return loaded_ddpo(tiny_pipeline, tiny_classifiers, inner_epochs=2, kl_weight=0.1)


def fit_with_all(folder, module, **options):
    """With averaged weights besides; a plateau is looked for, and grids are drawn, in any case."""
    fit(folder, module, [EMAWeightAveraging(decay=0.9)], **options)


@pytest.mark.parametrize(
    ("fault", "ranks"),
    [("update:6:term:0", 1), ("update:7:usr1:1", 2), ("save.replace:4:kill", 1)],
)
def test_a_ddpo_with_everything_on_goes_on(with_all, tmp_path, monkeypatch, fault, ranks):
    """Stopped between two inner epochs of the second rollout, and killed in a save."""
    options = {} if ranks == 1 else {"devices": 2, "strategy": "ddp"}

    def run(folder):
        return forked_ranks(partial(fit_with_all, **options), folder, with_all, ranks=ranks)

    assert run(tmp_path / "undisturbed") == [0] * ranks
    monkeypatch.setenv("FAULT", fault)
    code = {"term": 143, "usr1": 138, "kill": -9}[fault.split(":")[2]]
    assert run(tmp_path / "run") == [code] * ranks
    monkeypatch.delenv("FAULT")
    assert run(tmp_path / "run") == [0] * ranks
    whole = everything(tmp_path / "undisturbed")
    assert "current_model_state" in whole["checkpoint"]
    assert len(whole["checkpoint"]["reward_window"]) > 0
    assert differing(everything(tmp_path / "run"), whole) == []


def sgd(parameters):
    """AdamW sees the sign of a gradient even where it is all rounding."""
    return torch.optim.SGD(parameters, lr=0.1)


@pytest.fixture(scope="module")
def descending(tiny_pipeline, tiny_classifiers):
    return loaded_ddpo(tiny_pipeline, tiny_classifiers, optimizer=sgd)


def test_two_processes_then_one_then_two(descending, tmp_path):
    folder, alone = tmp_path / "run", tmp_path / "alone"
    assert forked(fit, alone, descending) == 0
    for epochs, run, ranks in ((1, fit_on_two, 2), (2, fit, 1), (3, fit_on_two, 2)):
        again = partial(run, max_epochs=epochs, allow="world_size")
        assert set(forked_ranks(again, folder, descending, ranks=ranks)) == {0}
    one, many = last(alone), last(folder)
    assert one["reward_window"] == many["reward_window"]
    assert distance(one["state_dict"], many["state_dict"]) < 1e-5
    one, many = curves(alone), curves(folder)
    for tag in ("reward/mean", "reward/std", "reward/hair", "val/apr"):
        assert one[tag] == many[tag]
        assert [step for step, _ in many[tag]] == [0, 1, 2]


def test_another_number_of_processes_needs_consent_and_has_to_divide(policy, tmp_path, capfd):
    folder = tmp_path / "run"
    assert forked(partial(fit, max_epochs=1), folder, policy) == 0
    assert forked_ranks(fit_on_two, folder, policy, limit=15) == [1, 1]
    assert "world_size: 1 -> 2" in capfd.readouterr().err
    on_three = partial(fit, devices=3, strategy="ddp", allow="world_size")
    assert forked_ranks(on_three, folder, policy, ranks=3, limit=15) == [1, 1, 1]
    said = capfd.readouterr().err
    assert "8 samples" in said
    assert "multiple of 6; the nearest are 6 and 12" in said


def test_a_fresh_process_elsewhere_goes_on_bit_for_bit(
    tiny_pipeline, tiny_classifiers, tmp_path, monkeypatch
):
    """After a signal from outside; with another working directory, hash seed and logger."""

    def arguments(folder):
        return [
            *ddpo(folder, tiny_pipeline, tiny_classifiers, grids=True),
            *("--data.samples_per_epoch=8", "--data.validation_samples_per_prompt=0"),
            *("--model.steps=2", "--trainer.max_epochs=2"),
        ]

    run, undisturbed = tmp_path / "run", tmp_path / "undisturbed"
    assert forked(in_process, *arguments(undisturbed)) == 0
    monkeypatch.setenv("FAULT", "update:3:stop")
    options = {"ranks": 1, "stopped_get": signal.SIGTERM}
    assert forked_ranks(in_process, *arguments(run), **options) == [143]
    monkeypatch.delenv("FAULT")
    (tmp_path / "there").mkdir()
    fresh = [*arguments(run), "--trainer.logger=false"]
    process = start_process(tmp_path / "there", *fresh, PYTHONHASHSEED="1")
    _, said = process.communicate(timeout=250)
    assert process.returncode == 0, said
    ends = [everything(folder)["checkpoint"] for folder in (run, undisturbed)]
    assert differing(*ends) == []
