from functools import partial

import pytest
import torch
from command_line import ddpo, in_process, start_process
from forked import forked, forked_ranks
from lightning.pytorch.callbacks import EMAWeightAveraging
from runs import curves, differing, everything, fit, fit_on_two, last, loaded_ddpo, trainer_of

from datamodules.dermoscopy import DermoscopyFolder
from datamodules.errors import UserError
from datamodules.isic import ISICDataModule
from lightning_modules import AttributeClassifier
from lightning_modules.rollout import require_divisible


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
def policy(tiny_pipeline, tiny_classifiers):
    return loaded_ddpo(tiny_pipeline, tiny_classifiers, optimizer=sgd)


def sgd(parameters):
    """AdamW sees the sign of a gradient even where it is all rounding."""
    return torch.optim.SGD(parameters, lr=0.1)


def test_two_processes_then_one_then_two(policy, tmp_path):
    folder, alone = tmp_path / "run", tmp_path / "alone"
    assert forked(fit, alone, policy) == 0
    for epochs, run in ((1, fit_on_two), (2, fit), (3, fit_on_two)):
        again = partial(run, max_epochs=epochs, allow="world_size")
        codes = (
            [forked(again, folder, policy)] if run is fit else forked_ranks(again, folder, policy)
        )
        assert set(codes) == {0}
    one, many = last(alone), last(folder)
    assert one["reward_window"] == many["reward_window"]
    for name, weight in one["state_dict"].items():
        torch.testing.assert_close(many["state_dict"][name], weight, rtol=1e-5, atol=1e-7)
    steps = [step for step, _ in curves(folder)["reward/mean"]]
    assert steps == [0, 1, 2]


def test_another_number_of_processes_needs_consent(policy, tmp_path, capfd):
    assert forked(partial(fit, max_epochs=1), tmp_path / "run", policy) == 0
    assert 1 in forked_ranks(fit_on_two, tmp_path / "run", policy)
    assert "world_size: 1 -> 2" in capfd.readouterr().err


def test_a_number_of_processes_that_does_not_divide_names_what_does():
    with pytest.raises(UserError, match="256 samples") as error:
        require_divisible(256, updates=2, ranks=3)
    assert "multiple of 6; the nearest are 252 and 258" in str(error.value)


def test_a_fresh_process_elsewhere_goes_on_bit_for_bit(tiny_pipeline, tiny_classifiers, tmp_path):
    """Another working directory, hash seed and logger; ended by a signal from outside."""

    def arguments(folder):
        return [
            *ddpo(folder, tiny_pipeline, tiny_classifiers),
            *("--data.samples_per_epoch=8", "--data.validation_samples_per_prompt=0"),
            *("--model.steps=2", "--trainer.max_epochs=2"),
        ]

    assert forked(in_process, *arguments(tmp_path / "undisturbed")) == 0
    run = tmp_path / "run"
    for cwd, faults in (("here", {"FAULT": "update:3:term", "PYTHONHASHSEED": "1"}), ("there", {})):
        (tmp_path / cwd).mkdir()
        logger = [] if faults else ["--trainer.logger=false"]
        process = start_process(tmp_path / cwd, *arguments(run), *logger, **faults)
        _, said = process.communicate(timeout=250)
        assert process.returncode == (143 if faults else 0), said
    ends = [everything(folder)["checkpoint"] for folder in (run, tmp_path / "undisturbed")]
    assert differing(*ends) == []
