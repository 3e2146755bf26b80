import json
import shutil

import pytest
import torch

from rl4med_ddpo.fault_tolerance.settings import differences, is_allowed, settings_of
from rl4med_ddpo.foundation.errors import UserError
from rl4med_ddpo.lightning_modules.classifier import AttributeClassifier, load_classifier
from support.command_line import ddpo, in_process
from support.tiny_runs import last


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


@pytest.fixture(scope="module")
def begun(tiny_pipeline, tiny_classifiers, tmp_path_factory):
    """A run of one epoch, and the arguments that go on with it."""
    folder = tmp_path_factory.mktemp("begun")
    args = [
        *ddpo(folder / "run", tiny_pipeline, tiny_classifiers),
        *("--data.samples_per_epoch=8", "--data.validation_samples_per_prompt=0"),
        "--model.steps=2",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        in_process(*args, "--trainer.max_epochs=1")
    return folder / "run", [*args, "--trainer.max_epochs=2"]


@pytest.mark.parametrize(
    ("option", "key", "shown"),
    [
        ("--model.optimizer.lr=0.5", "lr", "model.optimizer.lr: 0.0003 -> 0.5"),
        ("--model.clip_range=0.5", "clip_range", "model.clip_range: 0.01 -> 0.5"),
        ("--data.prompts=balanced", "prompts", "data.prompts: ['a dermoscopic"),
        ("--model.reward=Brightness", "reward", "model.reward: "),
        ("--seed_everything=7", "seed_everything", "seed_everything: 42 -> 7"),
    ],
)
def test_a_changed_setting_is_shown_and_refused(begun, monkeypatch, option, key, shown):
    folder, args = begun
    monkeypatch.chdir(folder.parent)
    options = [option, "--data.samples_per_epoch=64"] if key == "prompts" else [option]
    before = last(folder)
    with pytest.raises(UserError) as error:
        in_process(*args, *options)
    message = str(error.value)
    for part in (shown, "--resume.allow '[", key, "--ckpt_path null"):
        assert part in message
    assert last(folder)["global_step"] == before["global_step"]


def test_another_reward_checkpoint_under_the_same_name_is_noticed(
    begun, tiny_classifiers, monkeypatch, tmp_path
):
    folder, args = begun
    monkeypatch.chdir(folder.parent)
    other = tmp_path / "reward.ckpt"
    whole = torch.load(tiny_classifiers["reward"], weights_only=True)
    whole["state_dict"]["network.classifier.bias"] += 1
    torch.save(whole, other)
    load_classifier(other)
    with pytest.raises(UserError, match=r"sha256 of model\.reward\.classifier: \w+ -> \w+"):
        in_process(*args, f"--model.reward.classifier={other}")


def test_an_allowed_change_of_the_learning_rate_takes_effect(begun, monkeypatch):
    """Lightning would announce the new one and train with the old one."""
    folder, args = begun
    monkeypatch.chdir(folder.parent)
    assert last(folder)["optimizer_states"][0]["param_groups"][0]["lr"] == 3e-4
    with pytest.warns(UserWarning, match=r"model\.optimizer\.lr: 0\.0003 -> 1e-05"):
        cli = in_process(*args, "--model.optimizer.lr=1e-5", "--resume.allow=lr")
    assert cli.trainer.optimizers[0].param_groups[0]["lr"] == 1e-5
    assert last(folder)["optimizer_states"][0]["param_groups"][0]["lr"] == 1e-5


def test_a_pipeline_of_the_hub_counts_by_its_commit(
    tiny_pipeline, tiny_classifiers, tmp_path, monkeypatch
):
    """It is recorded with the run, and the run does not go on from another."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    there = tmp_path / "hub" / "models--some--pipeline"
    for commit in ("1" * 40, "2" * 40):
        shutil.copytree(tiny_pipeline, there / "snapshots" / commit)
    (there / "refs").mkdir()
    (there / "refs" / "main").write_text("1" * 40)
    args = [
        *ddpo(tmp_path / "run", "some/pipeline", tiny_classifiers),
        *("--data.samples_per_epoch=8", "--data.validation_samples_per_prompt=0"),
        "--model.steps=2",
    ]
    with pytest.warns(UserWarning, match=f"some/pipeline is at commit {'1' * 40}"):
        in_process(*args, "--trainer.max_epochs=1")
    manifest = json.loads((tmp_path / "run" / "checkpoints" / "newest.ckpt.json").read_text())
    assert manifest["settings"]["commit of model.pipeline"] == "1" * 40
    (there / "refs" / "main").write_text("2" * 40)
    with pytest.raises(UserError, match=r"commit of model\.pipeline: 1{40} -> 2{40}") as error:
        in_process(*args, "--trainer.max_epochs=2")
    assert "--resume.allow '[pipeline]'" in str(error.value)


def test_pretrained_weights_of_timm_count_by_their_commit(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert AttributeClassifier("efficientnet_b0").commits() == {"pretrained": None}
    there = tmp_path / "models--timm--efficientnet_b0.ra_in1k"
    (there / "snapshots" / ("1" * 40)).mkdir(parents=True)
    (there / "snapshots" / ("1" * 40) / "model.safetensors").touch()
    (there / "refs").mkdir()
    (there / "refs" / "main").write_text("1" * 40)
    assert AttributeClassifier("efficientnet_b0").commits() == {"pretrained": "1" * 40}
    assert AttributeClassifier("efficientnet_b0", False).commits() == {"pretrained": None}
