import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from rl4med_ddpo.datamodules.annotations import read_annotations
from rl4med_ddpo.datamodules.sampling import EpochSampler, inverse_frequency
from rl4med_ddpo.datamodules.splits import make_splits
from support.dermoscopy import ATTRIBUTES

N = 21


def keys(epoch, rank=0, world=1, seed=7, weights=None):
    sampler = EpochSampler(TensorDataset(torch.zeros(N)), seed, weights, world, rank)
    sampler.set_epoch(epoch)
    return list(sampler)


def test_each_image_once_in_another_order_in_each_epoch():
    orders = [[key % N for key in keys(epoch)] for epoch in range(3)]
    assert all(sorted(order) == list(range(N)) for order in orders)
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert [key % N for key in keys(1, seed=8)] != orders[1]


def test_epoch_and_seed_decide_alone():
    assert keys(5) == keys(5)


def test_keys_count_the_draws_of_the_run():
    assert [key // N for epoch in range(3) for key in keys(epoch)] == list(range(3 * N))


@pytest.mark.parametrize("world", [2, 3, 4])
def test_processes_share_what_one_process_draws(world):
    shares = [keys(2, rank, world) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    together = [key % N for step in zip(*shares, strict=True) for key in step]
    alone = [key % N for key in keys(2)]
    assert together == (alone + alone)[: len(together)]
    draws = {key for share in shares for key in share}
    assert len(draws) == len(together), "a repeated image is another draw"


def test_weights_are_inverse_frequencies_of_the_rarest_attribute():
    conditions = np.array([[1, 0, 1], [0, 1, 1], [0, 1, 1], [0, 0, 1]], np.float32)
    assert inverse_frequency(conditions) == pytest.approx(np.array([4, 2, 2, 1]) / 9)


def test_images_without_any_attribute_are_drawn_as_a_group_of_their_own():
    conditions = np.array([[1, 0], [1, 0], [0, 0], [0, 0], [0, 0], [0, 0]], np.float32)
    assert inverse_frequency(conditions) == pytest.approx(np.array([2, 2, 1, 1, 1, 1]) / 8)
    assert inverse_frequency(np.zeros((4, 2), np.float32)) == pytest.approx(np.full(4, 1 / 4))


def test_balanced_draws_follow_the_weights():
    weights = np.arange(N) / np.arange(N).sum()
    drawn = np.concatenate([np.array(keys(e, weights=weights)) % N for e in range(2000)])
    share = np.bincount(drawn, minlength=N) / len(drawn)
    assert share == pytest.approx(weights, abs=0.004)


def test_rare_attributes_become_common(annotations_folder):
    train = make_splits(read_annotations(annotations_folder).frame, "paper").train
    conditions = train[list(ATTRIBUTES)].to_numpy(np.float32)
    before = dict(zip(ATTRIBUTES, conditions.mean(0), strict=True))
    after = dict(zip(ATTRIBUTES, inverse_frequency(conditions) @ conditions, strict=True))
    assert before["ink"] < 0.02
    assert all(share > 0.15 for share in after.values()), after
