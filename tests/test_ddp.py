import pytest
import torch
from command_line import as_process, ddpo, in_process
from tiny import distance


def dump_to(folder):
    options = f'{{"class_path": "rank_dump.RankDump", "init_args": {{"folder": "{folder}"}}}}'
    return f"--trainer.callbacks+={options}"


# plain SGD sees the scale of a gradient, and AdamW its sign even where it is all rounding
SGD = ("--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=0.1")


@pytest.mark.parametrize(("train", "optimizer"), [("lora", ()), ("full", SGD)])
def test_two_processes_train_the_weights_of_one(
    tiny_pipeline, tiny_classifiers, tmp_path, monkeypatch, train, optimizer
):
    monkeypatch.chdir(tmp_path)

    def args(folder, *more):
        return ddpo(
            folder, tiny_pipeline, tiny_classifiers, f"--model.train={train}", *optimizer,
            "--model.baseline=window", "--model.micro_batch=5", "--trainer.max_epochs=2",
            dump_to(folder), *more,
        )  # fmt: skip

    two, one = tmp_path / "two", tmp_path / "one"
    done = as_process(tmp_path, *args(two, "--trainer.devices=2", "--trainer.strategy=ddp"))
    assert done.returncode == 0, done.stderr
    in_process(*args(one, "--trainer.devices=1"))
    ranks = [torch.load(two / f"rank_{rank}.pt", weights_only=True) for rank in (0, 1)]
    alone = torch.load(one / "rank_0.pt", weights_only=True)

    assert distance(ranks[0]["state"], ranks[1]["state"]) == 0
    assert ranks[0]["window"] == ranks[1]["window"]
    # many passes, one reduction for each optimizer step
    assert [r["reductions"] for r in ranks] == [4, 4]
    assert [r["optimizer_steps"] for r in ranks] == [4, 4]

    assert distance(ranks[0]["state"], alone["state"]) < 1e-5
    for name in ("reward/mean", "reward/std", "reward/hair", "val/apr", "val/reward"):
        assert ranks[0]["metrics"][name] == ranks[1]["metrics"][name]
        assert ranks[0]["metrics"][name] == pytest.approx(alone["metrics"][name], abs=1e-5)
