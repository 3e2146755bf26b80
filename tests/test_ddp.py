import pytest
import torch

from rl4med_ddpo.foundation.errors import UserError
from support.command_line import as_process, ddpo, in_process
from support.forked import forked_ranks
from support.tiny import distance


def dump_to(folder):
    callback = "support.rank_dump.RankDump"
    options = f'{{"class_path": "{callback}", "init_args": {{"folder": "{folder}"}}}}'
    return f"--trainer.callbacks+={options}"


# plain SGD sees the scale of a gradient, and AdamW its sign even where it is all rounding
SGD = ("--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=0.1")
ONE_PASS = ("--model=OnePassDDPO", "--model.updates=1", "--model.inner_epochs=1")


@pytest.mark.parametrize(
    ("options", "steps"),
    [((), 4), (("--model.train=full", *SGD), 4), ((*ONE_PASS, *SGD), 2)],
    ids=["lora", "full", "one pass"],
)
def test_two_processes_train_the_weights_of_one(
    tiny_pipeline, tiny_classifiers, tmp_path, monkeypatch, options, steps
):
    monkeypatch.chdir(tmp_path)

    def args(folder, *more):
        return ddpo(
            folder, tiny_pipeline, tiny_classifiers, *options,
            "--model.baseline=window", "--model.micro_batch=5", "--trainer.max_epochs=2",
            "--model.steps=2", dump_to(folder), *more,
        )  # fmt: skip

    two, one = tmp_path / "two", tmp_path / "one"
    parallel = args(two, "--trainer.devices=2", "--trainer.strategy=ddp")
    if options:
        assert forked_ranks(in_process, *parallel) == [0, 0]
    else:
        done = as_process(tmp_path, *parallel)
        assert done.returncode == 0, done.stderr
        for misplaced in ("\r", "litlogger", "sync_dist", "DistributedSampler"):
            assert misplaced not in done.stdout + done.stderr
    in_process(*args(one, "--trainer.devices=1"))
    ranks = [torch.load(two / f"rank_{rank}.pt", weights_only=True) for rank in (0, 1)]
    alone = torch.load(one / "rank_0.pt", weights_only=True)

    assert distance(ranks[0]["state"], ranks[1]["state"]) == 0
    # every sample's reward, in order
    assert ranks[0]["window"] == ranks[1]["window"] == alone["window"]
    # many passes, one reduction for each optimizer step
    assert [r["reductions"] for r in ranks] == [steps, steps]
    assert [r["optimizer_steps"] for r in ranks] == [steps, steps]

    assert distance(ranks[0]["state"], alone["state"]) < 1e-5
    for name in ("reward/mean", "reward/std", "reward/hair", "val/apr", "val/reward"):
        assert ranks[0]["metrics"][name] == ranks[1]["metrics"][name]
        assert ranks[0]["metrics"][name] == pytest.approx(alone["metrics"][name], abs=1e-5)


def test_four_processes_and_a_resume_on_fewer_train_the_weights_of_one(
    tiny_pipeline, tiny_classifiers, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)

    def args(folder, epochs, *more):
        return ddpo(
            folder, tiny_pipeline, tiny_classifiers, *SGD, "--model.kl_weight=0.1",
            "--model.steps=2", "--data.validation_samples_per_prompt=0",
            f"--trainer.max_epochs={epochs}", dump_to(folder), *more,
        )  # fmt: skip

    four, one = tmp_path / "four", tmp_path / "one"
    parallel = ("--trainer.devices=4", "--trainer.strategy=ddp")
    assert forked_ranks(in_process, *args(four, 1, *parallel), ranks=4) == [0] * 4
    ranks = [torch.load(four / f"rank_{rank}.pt", weights_only=True) for rank in range(4)]
    assert all(distance(ranks[0]["state"], other["state"]) == 0 for other in ranks[1:])
    assert [rank["reductions"] for rank in ranks] == [2] * 4
    with pytest.raises(UserError, match="world_size: 4 -> 1"):
        in_process(*args(four, 2, "--trainer.devices=1"))
    with pytest.warns(UserWarning, match="world_size: 4 -> 1"):
        in_process(*args(four, 2, "--trainer.devices=1", "--resume.allow=world_size"))
    in_process(*args(one, 2, "--trainer.devices=1"))
    went_on, alone = (torch.load(folder / "rank_0.pt", weights_only=True) for folder in (four, one))
    assert distance(went_on["state"], alone["state"]) < 1e-5
