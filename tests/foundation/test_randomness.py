import torch

from rl4med_ddpo.foundation.randomness import generator, key, keys


def test_a_key_depends_on_everything_it_is_made_of():
    made = {
        key(seed, purpose, *indices)
        for seed in (0, 1)
        for purpose in ("rollout", "order")
        for indices in ((), (0,), (1,), (0, 0), (0, 1), (1, 0), (11,), (1, 1))
    }
    assert len(made) == 2 * 2 * 8
    assert all(0 <= k < 2**63 for k in made)


def test_a_key_is_the_same_in_every_process_and_for_ever():
    # another value would draw other images for every published number
    assert key(42, "rollout", 3, 17) == 756841047347840965


def test_keys_number_samples():
    made = keys(42, "rollout", 3, torch.tensor([17, 0, 17]))
    assert made.dtype == torch.int64
    assert made.tolist() == [key(42, "rollout", 3, i) for i in (17, 0, 17)]


def test_neighbouring_keys_give_unrelated_streams():
    streams = torch.stack(
        [torch.randn(4096, generator=generator(key(42, "rollout", 0, i))) for i in range(8)]
    )
    correlation = torch.corrcoef(streams) - torch.eye(8)
    assert correlation.abs().max() < 0.08
    assert torch.equal(streams[3], torch.randn(4096, generator=generator(key(42, "rollout", 0, 3))))
