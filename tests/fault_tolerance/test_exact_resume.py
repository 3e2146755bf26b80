import pytest
import torch
from forked import forked
from runs import differing, everything, last, trainer_of

from datamodules.dermoscopy import DermoscopyFolder
from datamodules.isic import ISICDataModule
from lightning_modules import AttributeClassifier


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
