import math

import pytest
import torch

from rl4med_ddpo.metrics.apr import ArtifactPrevalenceRate
from support.dermoscopy import ATTRIBUTES, CONDITIONS


def draws(n, heads, seed=0):
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randint(31, (n,), generator=draw)
    logits = torch.randn(n, heads, generator=draw)
    wanted = CONDITIONS[rows][:, :heads] * 2 - 1
    return torch.where(torch.rand(n, 1, generator=draw) < 0.4, wanted, logits), rows


def recount(logits, rows):
    """Eq. (3) image by image."""
    correct, n = [0] * 32, [0] * 32
    for logit, row in zip(logits.tolist(), rows.tolist(), strict=True):
        present = {
            a for a, x in zip(ATTRIBUTES, logit, strict=False) if 1 / (1 + math.exp(-x)) > 0.5
        }
        asked = {a for a, on in zip(ATTRIBUTES, CONDITIONS[row].tolist(), strict=True) if on}
        judged = set(ATTRIBUTES[: len(logit)])
        correct[row] += present == asked & judged
        n[row] += 1
    return correct, n


@pytest.mark.parametrize("heads", [4, 6])
def test_agrees_with_a_count_image_by_image(heads):
    metric = ArtifactPrevalenceRate(32)
    logits, rows = draws(300, heads)
    for part in torch.arange(300).split(77):
        metric.update(logits[part], CONDITIONS[rows[part]][:, :heads], rows[part])
    correct, n = recount(logits, rows)
    result = metric.compute()
    assert result.correct.tolist() == correct
    assert result.n.tolist() == n
    assert result.rate.item() == pytest.approx(sum(correct) / 300)
    assert 0 < sum(correct) < 300


def test_an_artifact_too_many_is_as_wrong_as_one_too_few():
    hair, row = CONDITIONS[1:2, :4], torch.tensor([1])
    right = torch.tensor([[3.0, -3, -3, -3]])
    metric = ArtifactPrevalenceRate(32)
    rates = []
    for change in ([1, 1, 1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]):
        rates.append(metric(right * torch.tensor(change), hair, row).rate.item())
    assert rates == [1, 0, 0]
    assert metric.compute().rate.item() == pytest.approx(1 / 3)


def test_probability_of_one_half_is_absent():
    metric = ArtifactPrevalenceRate(1)
    assert metric(torch.zeros(1, 4), torch.zeros(1, 4), torch.tensor([0])).rate == 1


def test_large_counts_keep_their_last_image():
    metric = ArtifactPrevalenceRate(1)
    n = 2**25 + 1
    metric.correct += n - 1
    metric.n += n
    metric.update(torch.zeros(1, 4), torch.ones(1, 4), torch.tensor([0]))
    assert metric.compute().n.item() - metric.compute().correct.item() == 2


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_without_images_there_is_no_rate():
    assert ArtifactPrevalenceRate(32).compute().rate.isnan()


def test_heads_must_fit():
    with pytest.raises(ValueError, match="each head"):
        ArtifactPrevalenceRate(32).update(torch.zeros(2, 4), CONDITIONS[:2], torch.arange(2))
