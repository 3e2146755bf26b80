import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rl4med_ddpo.callbacks import SampleGrid, sample_grid
from rl4med_ddpo.foundation.errors import UserError
from support.dermoscopy import PROMPTS
from support.policies import Policy, RewardedPolicy, loader
from support.trainers import quiet_trainer


def names(path):
    return sorted(p.name for p in (path / "grids").iterdir())


def brightness(path, epoch):
    grid = np.asarray(Image.open(path / "grids" / f"epoch_{epoch:04d}.png"))
    return grid[40, 40, 0] / 255


def test_draws_before_training_every_few_epochs_and_at_the_end(tmp_path):
    quiet_trainer(tmp_path, SampleGrid(every_n_epochs=2), max_epochs=5).fit(Policy(), loader())
    assert names(tmp_path) == [f"epoch_000{i}.png" for i in (0, 2, 4, 5)]
    for epoch in (0, 2, 4, 5):
        assert brightness(tmp_path, epoch) == pytest.approx(0.1 * epoch, abs=0.003)


def test_prompts_and_noise_are_the_same_each_time_and_in_every_run(tmp_path):
    first, again, other = Policy(), Policy(), Policy()
    quiet_trainer(tmp_path, SampleGrid(), max_epochs=5).fit(first, loader())
    quiet_trainer(tmp_path, SampleGrid(), max_epochs=5).fit(again, loader())
    quiet_trainer(tmp_path, SampleGrid(seed=1), max_epochs=5).fit(other, loader())
    prompts, noise = first.asked[0]
    assert first.asked == again.asked == [(prompts, noise)] * 2
    assert len(set(noise)) == len(noise) == 48
    assert set(prompts) <= set(PROMPTS)
    assert len(set(prompts)) == 12
    assert not set(noise) & set(other.asked[0][1])


def test_a_resumed_run_does_not_draw_its_start_again(tmp_path):
    trainer = quiet_trainer(tmp_path, SampleGrid(every_n_epochs=2), max_epochs=3)
    trainer.fit(Policy(), loader())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    module = Policy()
    quiet_trainer(tmp_path, SampleGrid(every_n_epochs=2), max_epochs=5).fit(
        module, loader(), ckpt_path=tmp_path / "end.ckpt"
    )
    assert names(tmp_path) == [f"epoch_000{i}.png" for i in (0, 2, 3, 4, 5)]
    assert len(module.asked) == 2


def test_tensorboard_gets_the_picture_at_the_step_of_the_scalars(tmp_path):
    loggers = [TensorBoardLogger(tmp_path, name="", version=""), CSVLogger(tmp_path / "csv")]
    trainer = quiet_trainer(
        tmp_path, SampleGrid(every_n_epochs=2), logger=loggers, log_every_n_steps=1, max_epochs=5
    )
    trainer.fit(Policy(), loader())
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0})
    events.Reload()
    images = events.Images("samples")
    assert [image.step for image in images] == [0, 2, 4, 5]
    grid = Image.open(tmp_path / "grids" / "epoch_0002.png")
    assert (images[0].width, images[0].height) == grid.size
    assert max(e.step for e in events.Scalars("reward/mean")) == 4


def test_captions_say_what_was_asked_and_what_it_earned(tmp_path, monkeypatch):
    seen = []
    draw = sample_grid.sheet

    def spy(rows):
        seen.append([panel.caption for row in rows for panel in row])
        return draw(rows)

    monkeypatch.setattr(sample_grid, "sheet", spy)
    chosen = [PROMPTS[0], PROMPTS[-1]]
    for module in (Policy(), RewardedPolicy()):
        grid = SampleGrid(prompts=chosen, samples_per_prompt=1)
        quiet_trainer(tmp_path, grid, max_epochs=1).fit(module, loader())
    assert seen[0] == ["MEL: no artifacts", "NV: hair, gel bubble, ruler, ink"]
    assert seen[-1] == ["MEL: no artifacts  r=0.17", "NV: hair, gel bubble, ruler, ink  r=0.83"]


def test_a_dry_run_leaves_nothing(tmp_path):
    quiet_trainer(tmp_path, SampleGrid(), fast_dev_run=True).fit(Policy(), loader())
    assert not (tmp_path / "grids").exists()


def test_gradients_are_not_kept(tmp_path):
    class Checking(Policy):
        def generate(self, prompts, noise_keys):
            assert not torch.is_grad_enabled()
            return super().generate(prompts, noise_keys)

    module = Checking()
    quiet_trainer(tmp_path, SampleGrid(), max_epochs=1).fit(module, loader())
    assert module.asked


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every_n_epochs": 0}, "at least 1"),
        ({"samples_per_prompt": 0}, "at least 1"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        SampleGrid(**settings)


def test_a_prompt_that_the_data_do_not_have_is_refused_before_the_first_grid(tmp_path):
    module, grid = Policy(), SampleGrid(prompts=["a photo of a cat"])
    with pytest.raises(UserError, match="a photo of a cat"):
        quiet_trainer(tmp_path, grid, max_epochs=1).fit(module, loader())
    assert not module.asked
