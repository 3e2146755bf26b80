import pytest
import torch

from rl4med_ddpo.metrics.attribute_scores import AttributeScores

NAMES = ("hair", "gel_bubble", "ruler", "ink")


def recount(logits, targets):
    """F1, accuracy and AUROC of one attribute from their definitions, pair by pair."""
    pairs = list(zip(logits.tolist(), targets.tolist(), strict=True))
    tp = sum(x > 0 and y == 1 for x, y in pairs)
    fp = sum(x > 0 and y == 0 for x, y in pairs)
    fn = sum(x <= 0 and y == 1 for x, y in pairs)
    above = [(x > w) + (x == w) / 2 for x, y in pairs if y == 1 for w, v in pairs if v == 0]
    return 2 * tp / (2 * tp + fp + fn), 1 - (fp + fn) / len(pairs), sum(above) / len(above)


def drawn(n=90):
    draw = torch.Generator().manual_seed(3)
    targets = (torch.rand(n, 4, generator=draw) < torch.tensor([0.5, 0.3, 0.2, 0.1])).long()
    logits = torch.randn(n, 4, generator=draw) + targets - 0.3
    return logits.round(decimals=1), targets


def test_agrees_with_the_definitions():
    logits, targets = drawn()
    scores = AttributeScores(NAMES)
    for part in torch.arange(90).split(40):
        scores.update(logits[part], targets[part])
    found = scores.compute()
    expected = [recount(logits[:, i], targets[:, i]) for i in range(4)]
    for i, name in enumerate(NAMES):
        for kind, value in zip(("f1", "accuracy", "auroc"), expected[i], strict=True):
            assert found[f"{kind}/{name}"].item() == pytest.approx(value, abs=1e-6), (kind, name)
        assert found[f"positives/{name}"] == targets[:, i].sum()
    for j, kind in enumerate(("f1", "accuracy", "auroc")):
        assert found[f"{kind}/mean"].item() == pytest.approx(sum(e[j] for e in expected) / 4)
    exact = sum(
        (row > 0).tolist() == (truth > 0).tolist()
        for row, truth in zip(logits, targets, strict=True)
    )
    assert found["exact_match"].item() == pytest.approx(exact / 90)
    assert found["n"] == 90


def test_an_attribute_that_no_image_has_has_no_f1():
    logits, targets = drawn()
    targets[:, 3] = 0
    scores = AttributeScores(NAMES)
    scores.update(logits, targets)
    found = scores.compute()
    assert "f1/ink" not in found
    assert "auroc/ink" not in found
    assert found["positives/ink"] == 0
    assert "accuracy/ink" in found
    f1 = [recount(logits[:, i], targets[:, i])[0] for i in range(3)]
    assert found["f1/mean"].item() == pytest.approx(sum(f1) / 3)


def test_reset_forgets():
    logits, targets = drawn()
    scores = AttributeScores(NAMES)
    scores.update(-logits, targets)
    scores.reset()
    scores.update(logits, targets)
    assert scores.compute()["n"] == 90
    assert scores.compute()["f1/hair"].item() == pytest.approx(
        recount(logits[:, 0], targets[:, 0])[0]
    )
