import gc

import torch

from rl4med_ddpo.foundation.progress import progress
from rl4med_ddpo.lightning_modules import DDPO, Brightness
from support.tiny import prompts, tiny_ddpo
from support.trainers import quiet_trainer


class Living:
    """The most bytes that tensors hold at once, looked at after the rollout and each update."""

    def __init__(self):
        self.most = 0

    def look(self, phase, done, total):
        if done < total:
            return
        storages = {
            (s := t.untyped_storage()).data_ptr(): s.nbytes()
            for t in gc.get_objects()
            if type(t) is torch.Tensor
        }
        self.most = max(self.most, sum(storages.values()))


def test_memory_grows_with_samples_times_latents_alone(tiny_pipeline, tiny_classifiers, tmp_path):
    peaks = {}
    # the optimizer has its moments from the second update on
    for samples, inner_epochs in ((16, 1), (32, 1), (16, 2), (16, 3)):
        policy = tiny_ddpo(
            tiny_pipeline, tiny_classifiers, kind=DDPO, reward=Brightness(), steps=4,
            inner_epochs=inner_epochs, updates=1, sample_batch=8, micro_batch=64,
        )  # fmt: skip
        gc.collect()
        living = Living()
        progress.subscribe(living.look)
        quiet_trainer(tmp_path, max_epochs=1).fit(policy, datamodule=prompts(samples))
        progress.unsubscribe(living.look)
        peaks[samples, inner_epochs] = living.most
        del policy
    # some numbers an update are logged
    assert abs(peaks[16, 3] - peaks[16, 2]) < 2000
    latents = (4 + 1) * 4 * 8 * 8 * 4
    log_probs, appearance = 4 * 4, 3 * 8 * 8 * 4
    grown = (peaks[32, 1] - peaks[16, 1]) / 16
    # an image has 3 x 16 x 16 numbers, and is not among them
    assert latents < grown < (latents + log_probs + appearance) * 1.02
