import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from support.command_line import ddpo, in_process


def last(folder):
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def curves(folder):
    """Every scalar of a run, in the order of the steps: {tag: [(step, value), ...]}."""
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {
        tag: [(e.step, e.value) for e in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if not tag.startswith("time/")
    }


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.mark.parametrize("train", ["lora", "full"])
def test_a_resumed_run_is_the_unbroken_one_bit_for_bit(
    tiny_pipeline, tiny_classifiers, tmp_path, monkeypatch, train
):
    monkeypatch.chdir(tmp_path)
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    options = [
        f"--model.train={train}", "--model.baseline=window", "--model.inner_epochs=2",
        "--model.steps=2", "--data.samples_per_epoch=8",
    ]  # fmt: skip

    def fit(folder, epochs):
        end = f"--trainer.max_epochs={epochs}"
        in_process(*ddpo(folder, tiny_pipeline, tiny_classifiers, *options, end))

    fit(unbroken, 3)
    fit(broken, 2)
    half = last(broken)
    fit(broken, 3)
    whole, resumed = last(unbroken), last(broken)
    assert (half["global_step"], resumed["global_step"]) == (8, 12)
    assert not same(half["state_dict"], resumed["state_dict"])
    for part in ("state_dict", "optimizer_states", "reward_window", "epoch", "global_step"):
        assert same(whole[part], resumed[part]), part
    (plateau,) = (name for name in whole["callbacks"] if "RewardPlateau" in name)
    assert whole["callbacks"][plateau] == resumed["callbacks"][plateau]
    assert len(resumed["callbacks"][plateau]["rewards"]) == 3
    assert curves(unbroken) == curves(broken)
    assert [step for step, _ in curves(broken)["reward/mean"]] == [0, 1, 2]


def test_a_finished_run_is_not_trained_again_and_null_starts_anew(
    tiny_pipeline, tiny_classifiers, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    args = ddpo(tmp_path / "run", tiny_pipeline, tiny_classifiers, "--trainer.max_epochs=1")
    in_process(*args)
    first = last(tmp_path / "run")
    in_process(*args)
    assert same(first["state_dict"], last(tmp_path / "run")["state_dict"])
    cli = in_process(*args, "--ckpt_path=null", "--model.seed=7")
    assert cli.trainer.global_step == 2
    assert not same(first["state_dict"], last(tmp_path / "run")["state_dict"])
