import math

import pytest
import torch

from datamodules.attributes import ARTIFACTS, ATTRIBUTES, CONDITIONS
from metrics.apr import ArtifactPrevalenceRate


def draws(n, heads, seed=0):
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randint(31, (n,), generator=draw)
    logits = torch.randn(n, heads, generator=draw)
    wanted = CONDITIONS[rows][:, :heads] * 2 - 1
    return torch.where(torch.rand(n, 1, generator=draw) < 0.4, wanted, logits), rows


def recount(logits, rows):
    """Eq. (3) image by image."""
    hits, counts = [0] * 32, [0] * 32
    for logit, row in zip(logits.tolist(), rows.tolist(), strict=True):
        present = {
            a for a, x in zip(ATTRIBUTES, logit, strict=False) if 1 / (1 + math.exp(-x)) > 0.5
        }
        asked = {a for a, on in zip(ATTRIBUTES, CONDITIONS[row].tolist(), strict=True) if on}
        judged = set(ATTRIBUTES[: len(logit)])
        hits[row] += present == asked & judged
        counts[row] += 1
    return hits, counts


@pytest.mark.parametrize("attributes", [ARTIFACTS, ATTRIBUTES])
def test_agrees_with_a_count_image_by_image(attributes):
    metric = ArtifactPrevalenceRate(attributes)
    logits, rows = draws(300, len(attributes))
    for part in torch.arange(300).split(77):
        metric.update(logits[part], CONDITIONS[rows[part]])
    hits, counts = recount(logits, rows)
    result = metric.compute()
    assert result["hits"].tolist() == hits
    assert result["counts"].tolist() == counts
    assert result["rate"].item() == pytest.approx(sum(hits) / 300)
    assert 0 < sum(hits) < 300


def test_an_artifact_too_many_is_as_wrong_as_one_too_few():
    hair = CONDITIONS[1:2]
    right = torch.tensor([[3.0, -3, -3, -3]])
    metric = ArtifactPrevalenceRate()
    rates = []
    for change in ([1, 1, 1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]):
        rates.append(metric(right * torch.tensor(change), hair)["rate"].item())
    assert rates == [1, 0, 0]
    assert metric.compute()["rate"].item() == pytest.approx(1 / 3)


def test_the_judge_does_not_look_at_the_disease():
    logits = CONDITIONS[:, :4] * 2 - 1
    other_disease = CONDITIONS.roll(16, dims=0)
    assert ArtifactPrevalenceRate()(logits, other_disease)["rate"] == 1
    wrong = torch.cat([logits, CONDITIONS[:, 4:] * 2 - 1], dim=1)
    assert ArtifactPrevalenceRate(ATTRIBUTES)(wrong, other_disease)["rate"] == 0


def test_probability_of_one_half_is_absent():
    nothing = CONDITIONS[0:1]
    assert ArtifactPrevalenceRate()(torch.zeros(1, 4), nothing)["rate"] == 1


def test_without_images_there_is_no_rate():
    assert ArtifactPrevalenceRate().compute()["rate"].isnan()


def test_two_diseases_are_no_prompt():
    both = torch.tensor([[0.0, 0, 0, 0, 1, 1]])
    with pytest.raises(ValueError, match="no prompt asks for"):
        ArtifactPrevalenceRate().update(torch.zeros(1, 4), both)


def test_heads_must_fit():
    with pytest.raises(ValueError, match="4 heads"):
        ArtifactPrevalenceRate().update(torch.zeros(2, 6), CONDITIONS[:2])
