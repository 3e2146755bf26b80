from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from rl4med_ddpo.lightning_modules import DDPO
from rl4med_ddpo.lightning_modules.policy_gradient.micro_batch import (
    MOST,
    USABLE,
    free_memory,
    largest_micro_batch,
    saved_bytes,
)
from support.tiny import distance, prompts, state_of, tiny_ddpo
from support.trainers import quiet_trainer

WIDTH = 100


@pytest.fixture
def make(tiny_pipeline, tiny_classifiers):
    return partial(tiny_ddpo, tiny_pipeline, tiny_classifiers)


def run(net, n):
    return net(torch.ones(n, WIDTH)).sum()


def network():
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Sigmoid())


def test_saved_bytes_are_those_autograd_keeps():
    net = network()
    one, three = (saved_bytes(lambda n=n: run(net, n)) for n in (1, 3))
    # the input, and the outputs of tanh (kept by it and by the next layer) and sigmoid
    assert three - one == 2 * 3 * WIDTH * 4


@pytest.mark.parametrize(("pairs_that_fit", "most", "found"), [(5, 99, 4), (8, 99, 8), (99, 6, 4)])
def test_the_largest_power_of_two_that_fits(pairs_that_fit, most, found):
    net = network()
    weight = WIDTH * WIDTH * 4
    free = (pairs_that_fit * 3 * WIDTH * 4 + weight + 600) / USABLE
    assert largest_micro_batch(lambda n: run(net, n), most, int(free)) == found


def test_it_is_never_none_and_never_more_than_helps():
    net = network()
    assert largest_micro_batch(lambda n: run(net, n), 99, 1000) == 1
    assert largest_micro_batch(lambda n: run(net, n), 10**6, 10**12) == MOST


def test_free_memory_is_some_of_the_machines():
    assert 2**20 < free_memory(torch.device("cpu")) < 2**50


def test_auto_trains_the_same_weights_and_is_kept_by_the_checkpoint(make, tmp_path):
    def sgd(parameters):
        return torch.optim.SGD(parameters, lr=1.0)

    found, given = make(micro_batch="auto", optimizer=sgd), make(micro_batch=3, optimizer=sgd)
    saver = ModelCheckpoint(tmp_path, filename="x")
    for policy, callbacks in ((found, [saver]), (given, [])):
        trainer = quiet_trainer(
            tmp_path, max_epochs=1, callbacks=callbacks, enable_checkpointing=bool(callbacks)
        )
        trainer.fit(policy, datamodule=prompts())
    # of 8 samples x 4 steps in an update, all fit
    assert found.micro_batch == 32
    assert distance(state_of(found), state_of(given)) < 1e-6
    again = DDPO.load_from_checkpoint(tmp_path / "x.ckpt", reward=found.reward)
    assert again.micro_batch == 32
