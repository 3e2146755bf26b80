import math

import pytest
import torch

from rl4med_ddpo.lightning_modules import DDPO, Brightness
from support.forked import forked_ranks
from support.tiny_runs import curves, fit_on_two, loaded_ddpo


class SpoiltOnOne(DDPO):
    """Gets a NaN in one place on process 1, and notes weights and moments around each epoch."""

    where, spoilt_epochs = "reward", (1,)

    @property
    def is_spoilt(self):
        return self.global_rank == 1 and self.current_epoch in self.spoilt_epochs

    def configure_model(self):
        if hasattr(self, "model"):
            return
        super().configure_model()
        self.decode, self.collect = self.model.decode, self.sampler.collect
        self.model.decode, self.sampler.collect = self.spoilt_images, self.spoilt_rollout

    def spoilt_rollout(self, *args):
        rollout = self.collect(*args)
        if self.is_spoilt and self.where == "latent":
            rollout.latents[0, 1, 0, 0, 0] = math.nan
        return rollout

    def spoilt_images(self, latents):
        images = self.decode(latents)
        if self.is_spoilt and self.where == "reward":
            images[0] = math.nan
        return images

    def accumulate(self, *args):
        if not (self.is_spoilt and self.where == "gradient"):
            return super().accumulate(*args)
        # before the processes' gradients are reduced to one
        hook = self.trained_parameters()[3].register_hook(lambda gradient: gradient * math.nan)
        means = super().accumulate(*args)
        hook.remove()
        return means

    def on_train_epoch_start(self):
        self.noted = [self.note()]

    def on_train_epoch_end(self):
        folder = f"{self.trainer.default_root_dir}/epoch_{self.current_epoch}"
        torch.save([*self.noted, self.note()], f"{folder}_{self.global_rank}.pt")

    def note(self):
        moments = self.optimizers().optimizer.state_dict()["state"]
        kept = {f"{i}.{name}": t.clone() for i, s in moments.items() for name, t in s.items()}
        return kept | {f"w{i}": p.detach().clone() for i, p in enumerate(self.trained_parameters())}


@pytest.fixture
def spoilt(tiny_pipeline, tiny_classifiers):
    options = {"reward": Brightness(), "std_floor": 1e-4, "updates": 1}
    return loaded_ddpo(tiny_pipeline, tiny_classifiers, kind=SpoiltOnOne, **options)


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("where", ["reward", "latent", "gradient"])
def test_what_is_not_finite_on_one_process_is_learnt_by_none(spoilt, tmp_path, where):
    folder = tmp_path / "run"
    folder.mkdir()
    spoilt.where = where
    assert forked_ranks(fit_on_two, folder, spoilt) == [0, 0]
    kept = [
        [torch.load(folder / f"epoch_{epoch}_{rank}.pt", weights_only=True) for rank in (0, 1)]
        for epoch in range(3)
    ]
    for epoch, ((before, after), (other_before, other_after)) in enumerate(kept):
        assert equal(before, other_before)
        assert equal(after, other_after)
        assert equal(before, after) == (epoch == 1)
        assert len(after) > len(spoilt.trained_parameters())
    skipped = dict(curves(folder)["trainer/skipped_updates"])
    assert skipped[0] == 0
    assert skipped[1] == skipped[2] == 1
    (file,) = (folder / "non_finite").glob("*.pt")
    assert torch.load(file, weights_only=True)["epoch"] == 1


def test_three_in_a_row_on_one_process_end_all(spoilt, tmp_path, capfd):
    spoilt.spoilt_epochs = (0, 1, 2)
    spoilt.hparams.max_skipped = 2
    (tmp_path / "run").mkdir()
    assert forked_ranks(fit_on_two, tmp_path / "run", spoilt, limit=15) == [1, 1]
    assert "3 updates in a row were not finite, 2 are allowed" in capfd.readouterr().err
    assert len(list((tmp_path / "run" / "non_finite").glob("*.pt"))) == 3
