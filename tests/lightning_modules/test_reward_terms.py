import torch

from rl4med_ddpo.lightning_modules.rewards.base import Rewards, joined, shares


def test_the_share_of_a_penalty_is_its_size():
    found = shares({"paid": torch.tensor([3.0, 0.0]), "taken": torch.tensor([-0.5, 0.5])})
    assert [value.item() for value in found.values()] == [0.75, 0.25]


def test_batches_are_joined_in_their_order():
    batches = [
        Rewards(torch.tensor(v), {"part": torch.tensor(v) + 1}, {"term": torch.tensor(v) + 2})
        for v in ([1.0, 2.0], [3.0])
    ]
    whole = joined(batches)
    assert whole.value.tolist() == [1, 2, 3]
    assert {name: part.tolist() for name, part in whole.parts.items()} == {"part": [2, 3, 4]}
    assert {name: term.tolist() for name, term in whole.terms.items()} == {"term": [3, 4, 5]}
