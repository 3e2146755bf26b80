import logging
import re

import pytest
import torch

from rl4med_ddpo.callbacks.preflight import Preflight, seconds, seconds_of, table
from rl4med_ddpo.lightning_modules import Brightness, DRaFT
from rl4med_ddpo.lightning_modules.policy_gradient.epoch import Epoch
from support.tiny import RecordedDDPO, prompts, tiny_ddpo, tiny_draft
from support.trainers import quiet_trainer

PAPER = Epoch(
    samples=256, ranks=4, sample_batch=24, steps=50, trained_steps=40, micro_batch=12,
    updates=2, inner_epochs=3, latent_bytes=51 * 4 * 64 * 64 * 4, on_host=True,
)  # fmt: skip


def test_an_epoch_is_counted():
    assert PAPER.samples_per_rank == 64
    assert PAPER.batches == 3
    assert PAPER.optimizer_steps == 6
    # 32 samples x 40 steps in batches of 12
    assert PAPER.passes == 107


def test_the_table_says_all_of_it():
    said = table(PAPER, *seconds_of(PAPER, step=0.5, training=0.1))
    rows = {line[:20].strip(): line[20:].split() for line in said.splitlines()[1:]}
    numbers = {name: row[0] for name, row in rows.items()}
    assert numbers == {
        "samples": "256", "samples a process": "64", "batches": "3", "optimizer steps": "6",
        "micro-batches": "107", "reductions": "6", "latents": "213.9", "seconds": "139.2",
    }  # fmt: skip
    assert rows["latents"] == ["213.9", "MB", "host"]
    assert "75.0 sampling, 64.2 training" in said


@pytest.mark.parametrize(("micro_batch", "sizes"), [(3, [3, 3, 2]), ("auto", [8])])
def test_draft_says_what_it_then_does(
    tiny_pipeline, tiny_classifiers, tmp_path, caplog, micro_batch, sizes
):
    passes = []

    class Counted(DRaFT):
        def losses(self, batch, rows):
            passes.append(len(rows))
            return super().losses(batch, rows)

    policy = tiny_draft(
        tiny_pipeline, tiny_classifiers, kind=Counted, last_steps=3, micro_batch=micro_batch
    )
    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[Preflight()])
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    with caplog.at_level(logging.INFO, logger=logger.name):
        trainer.fit(policy, datamodule=prompts(16))
    said = caplog.text[caplog.text.index("An epoch of DRaFT") :]
    numbers = dict(re.findall(r"^  ([a-z -]+?) {2,}([\d.,]+) ", said, flags=re.MULTILINE))
    assert float(numbers.pop("seconds")) > 0
    assert numbers == {
        "samples": "16", "samples a process": "16", "optimizer steps": "2",
        "micro-batches": str(len(sizes)), "steps": "4", "reductions": "2",
    }  # fmt: skip
    assert passes == sizes * 2


def test_before_the_first_rollout_the_table_says_what_the_run_then_does(
    tiny_pipeline, tiny_classifiers, tmp_path, caplog
):
    done = []

    class Counted(RecordedDDPO):
        def training_step(self, batch, batch_idx):
            done.append(caplog.text.count("An epoch of DDPO"))
            super().training_step(batch, batch_idx)

        def accumulate(self, rollout, passes):
            self.passes_made = len(passes)
            return super().accumulate(rollout, passes)

    policy = tiny_ddpo(
        tiny_pipeline, tiny_classifiers, kind=Counted, reward=Brightness(), micro_batch=5,
        timestep_fraction=0.5, inner_epochs=2,
    )  # fmt: skip
    trainer = quiet_trainer(tmp_path, max_epochs=2, callbacks=[Preflight()])
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    with caplog.at_level(logging.INFO, logger=logger.name):
        trainer.fit(policy, datamodule=prompts(32))
    assert done == [1, 1]
    rows = {line[:20].strip(): line[20:].split() for line in caplog.text.splitlines()}
    assert rows["samples"][0] == "32"
    assert int(rows["micro-batches"][0]) == policy.passes_made == 7
    assert int(rows["optimizer steps"][0]) * 2 == trainer.global_step == 8
    size = policy.rollouts[0].latents.numel() * 4 / 1e6
    assert float(rows["latents"][0]) == pytest.approx(size, abs=0.05)
    assert float(rows["seconds"][0]) > 0


def test_the_estimate_of_one_pass_has_no_pass_of_its_own():
    """A step of a batch takes a second, a training pass of half as many pairs six."""
    epoch = Epoch(16, 1, 8, 4, 2, 4, 1, 1, 0, on_host=False, one_pass=True)
    assert seconds_of(epoch, 1.0, 6.0) == (2 * (2 * 12.0 + 2 * 1.0), 0.0)


def test_the_second_of_two_runs_is_timed():
    runs = []
    assert 0 <= seconds(lambda: runs.append(1), torch.device("cpu")) < 1
    assert len(runs) == 2
