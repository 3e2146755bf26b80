import pytest

from fault_tolerance.settings import differences, is_allowed, settings_of


def config(**model):
    defaults = {"pipeline": "no/such", "clip_range": 1e-4, "policy": "a", "sample_batch": 8}
    return {
        "seed_everything": 1,
        "model": {"class_path": "DDPO", "init_args": defaults | model},
        "data": {"class_path": "Prompts", "init_args": {"num_workers": 0, "prompts": ["a", "b"]}},
        "trainer": {"precision": "32-true", "max_epochs": 3},
    }


def test_settings_are_named_as_they_are_typed():
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.1}}
    settings = settings_of(config(optimizer=optimizer))
    assert settings["model"] == "DDPO"
    assert settings["model.optimizer"] == "torch.optim.AdamW"
    assert settings["model.optimizer.lr"] == 0.1
    assert settings["data.prompts"] == ["a", "b"]
    assert settings["trainer.precision"] == "32-true"
    for neutral in ("model.policy", "model.sample_batch", "data.num_workers", "trainer.max_epochs"):
        assert neutral not in settings


def test_a_file_counts_by_its_content(tmp_path):
    weights = tmp_path / "reward.ckpt"
    weights.write_text("one")
    before = settings_of(config(reward=str(weights)))
    weights.write_text("two")
    changed = differences(before, settings_of(config(reward=str(weights))))
    assert list(changed) == ["sha256 of model.reward"]
    assert is_allowed("sha256 of model.reward", ["reward"])


@pytest.mark.parametrize(
    ("key", "allowed", "expected"),
    [
        ("model.optimizer.lr", ["lr"], True),
        ("model.optimizer.lr", ["optimizer.lr"], True),
        ("model.optimizer.lr", ["model.optimizer.lr"], True),
        ("model.optimizer.lr", ["r"], False),
        ("model.optimizer.lr", ["optimizer"], False),
        ("model.optimizer.lr", [], False),
    ],
)
def test_a_key_is_allowed_by_its_end(key, allowed, expected):
    assert is_allowed(key, allowed) is expected
