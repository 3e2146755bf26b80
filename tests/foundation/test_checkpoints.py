import ast
import importlib.metadata
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from packaging.version import Version

from rl4med_ddpo.callbacks import Export
from rl4med_ddpo.datamodules.tensor_folder import TensorFolder
from rl4med_ddpo.fault_tolerance.checkpoint_io import DurableCheckpointIO
from rl4med_ddpo.foundation.checkpoints import read_checkpoint, require_known_classes
from rl4med_ddpo.foundation.errors import UserError
from rl4med_ddpo.foundation.hashes import sha256_of
from rl4med_ddpo.lightning_modules import DDPO
from rl4med_ddpo.lightning_modules.classifier import load_classifier
from rl4med_ddpo.lightning_modules.diffusion.lora import load_policy
from rl4med_ddpo.lightning_modules.networks.backbone import build_backbone
from rl4med_ddpo.lightning_modules.pipelines.load import load_pipeline, load_unet
from rl4med_ddpo.lightning_modules.rewards import AttributeMatch, Brightness, RewardSum
from rl4med_ddpo.lightning_modules.text_to_image import TextToImage
from support.command_line import ROOT, ddpo, in_process
from support.dermoscopy import ATTRIBUTES
from support.tiny import prompts, tiny_ddpo
from support.trainers import quiet_trainer


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


@pytest.fixture
def canary(tmp_path):
    return tmp_path / "canary"


@pytest.fixture
def bomb(tmp_path, canary):
    """A checkpoint that runs code when it is unpickled."""
    path = tmp_path / "bomb.ckpt"
    torch.save({"state_dict": {"weight": Bomb(canary)}, "hyper_parameters": {}}, path)
    return path


def test_the_bomb_works(bomb, canary):
    torch.load(bomb, weights_only=False)
    assert canary.exists()


def assert_refused(canary, error, path):
    assert not canary.exists()
    message = str(error.value)
    assert str(path) in message
    for part in ("posix.mkdir", "safetensors"):
        assert part in message


def test_a_bomb_as_the_checkpoint_to_go_on_from(
    tiny_pipeline, tiny_classifiers, tmp_path, monkeypatch, bomb, canary
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        in_process(*ddpo(tmp_path / "run", tiny_pipeline, tiny_classifiers), f"--ckpt_path={bomb}")
    assert_refused(canary, error, bomb)


def test_a_bomb_as_the_reward_or_the_judge(bomb, canary):
    with pytest.raises(UserError) as error:
        load_classifier(bomb)
    assert_refused(canary, error, bomb)


def test_a_bomb_as_the_best_checkpoint(bomb, canary, tmp_path):
    best = ModelCheckpoint(monitor="val/apr")
    best.best_model_path = str(bomb)
    trainer = quiet_trainer(tmp_path, enable_checkpointing=True, callbacks=[best])
    with pytest.raises(UserError) as error:
        Export(str(tmp_path / "policy")).on_fit_end(trainer, None)
    assert_refused(canary, error, bomb)


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_a_bomb_as_a_part_of_a_pipeline(tiny_pipeline, tmp_path, bomb, canary, component):
    """Weights as pickles are not looked at, even where there are no others."""
    folder = shutil.copytree(tiny_pipeline, tmp_path / "pipeline")
    for weights in (folder / component).glob("*.safetensors"):
        weights.unlink()
    for name in ("diffusion_pytorch_model.bin", "pytorch_model.bin"):
        shutil.copy(bomb, folder / component / name)
    with pytest.raises(UserError) as error:
        load_pipeline(str(folder))
    assert not canary.exists()
    assert str(folder) in str(error.value)
    assert "safetensors" in str(error.value)


def test_a_bomb_as_a_unet_of_its_own(tiny_pipeline, tmp_path, bomb, canary):
    folder = shutil.copytree(Path(tiny_pipeline) / "unet", tmp_path / "unet")
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    shutil.copy(bomb, folder / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError) as error:
        load_unet(folder)
    assert not canary.exists()
    assert "safetensors" in str(error.value)


def test_a_bomb_as_a_single_file(tmp_path, bomb, canary):
    with pytest.raises(UserError) as error:
        load_pipeline(str(bomb))
    assert not canary.exists()
    assert "safetensors" in str(error.value)


def test_a_bomb_as_adapters(tiny_pipeline, tmp_path, bomb, canary):
    folder = tmp_path / "policy"
    folder.mkdir()
    shutil.copy(bomb, folder / "pytorch_lora_weights.bin")
    unet = load_pipeline(tiny_pipeline).unet
    with pytest.raises(UserError, match=r"pytorch_lora_weights\.safetensors") as error:
        load_policy(unet, folder)
    assert str(folder) in str(error.value)
    assert not canary.exists()


def test_a_bomb_as_a_backbones_weights(bomb, canary):
    with pytest.raises(UserError, match=r"Needed is a \.safetensors file") as error:
        build_backbone("test_resnet", str(bomb), outputs=4, dropout=0.0, image_size=32)
    assert str(bomb) in str(error.value)
    assert not canary.exists()


def test_a_bomb_in_the_cache_of_latents_or_of_copies(tmp_path, bomb, canary):
    entry = tmp_path / "cache" / "ab" / "abc.safetensors"
    entry.parent.mkdir(parents=True)
    shutil.copy(bomb, entry)
    with pytest.raises(UserError, match="Delete that file") as error:
        TensorFolder(tmp_path / "cache").read("abc")
    assert str(entry) in str(error.value)
    assert not canary.exists()


EVIL = "evil_module_of_a_stranger"
NAMED = {
    "_class_path": {"_class_path": f"{EVIL}.Evil"},
    "_instantiator": {"_instantiator": f"{EVIL}.evil", "backbone": "test_resnet"},
    "class_path": {"reward": {"class_path": f"{EVIL}.Evil", "init_args": {}}},
    "deep": {"a": [{"b": {"c": ({"class_path": f"{EVIL}.Evil"},)}}]},
    "a function": {"reward": {"class_path": "os.system"}},
    "no text": {"reward": {"class_path": 5}},
}


@pytest.fixture
def evil(tmp_path, monkeypatch, canary):
    """A module that touches a file when it is imported."""
    (tmp_path / f"{EVIL}.py").write_text(
        f"import pathlib\npathlib.Path({str(canary)!r}).touch()\nclass Evil: pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.usefixtures("evil")
@pytest.mark.parametrize("hyperparameters", NAMED.values(), ids=NAMED)
def test_a_checkpoint_has_nothing_imported(
    tiny_pipeline, tiny_classifiers, tmp_path, monkeypatch, canary, hyperparameters
):
    whole = torch.load(tiny_classifiers["reward"], weights_only=True)
    path = tmp_path / "plain.ckpt"
    torch.save(whole | {"hyper_parameters": whole["hyper_parameters"] | hyperparameters}, path)
    torch.load(path, weights_only=True)
    monkeypatch.chdir(tmp_path)
    for load in (load_classifier, read_checkpoint, DurableCheckpointIO().load_checkpoint):
        with pytest.raises(UserError) as error:
            load(path)
        assert not canary.exists()
        assert str(path) in str(error.value)
        assert "hyper_parameters" in str(error.value)
        assert any(name in str(error.value) for name in (f"{EVIL}.", "os.system", "names 5"))


@pytest.mark.usefixtures("evil")
def test_nor_does_the_command_line(tiny_pipeline, tiny_classifiers, tmp_path, monkeypatch, canary):
    path = tmp_path / "plain.ckpt"
    named = NAMED["class_path"] | NAMED["_class_path"]
    torch.save({"state_dict": {}, "hyper_parameters": named}, path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"hyper_parameters.*'{EVIL}.Evil'") as error:
        in_process(*ddpo(tmp_path / "run", tiny_pipeline, tiny_classifiers), f"--ckpt_path={path}")
    assert str(path) in str(error.value)
    assert not canary.exists()


def test_classes_that_are_loaded_may_be_named():
    require_known_classes(
        {
            "_instantiator": "lightning.pytorch.cli.instantiate_module",
            "_class_path": "rl4med_ddpo.lightning_modules.ddpo.DDPO",
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1}},
            "reward": {"class_path": "AttributeMatch"},
        },
        Path("x"),
    )


def test_weights_that_are_not_what_their_manifest_says(tiny_classifiers, tmp_path):
    path = tmp_path / "best.ckpt"
    DurableCheckpointIO().save_checkpoint(
        torch.load(tiny_classifiers["reward"], weights_only=True), path
    )
    saved = sha256_of(path)
    load_classifier(path)
    shutil.copy(tiny_classifiers["judge"], path)
    with pytest.raises(UserError, match="is not the file that was saved") as error:
        load_classifier(path)
    for part in (saved, sha256_of(path), "best.ckpt.json"):
        assert part in str(error.value)


FORBIDDEN = {
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "joblib.load", "np.load"),
    *("yaml.load", "yaml.unsafe_load", "yaml.full_load", "eval", "exec"),
}


def sources():
    return [
        path
        for path in ROOT.rglob("*.py")
        if not {"tests", ".venv"} & set(path.relative_to(ROOT).parts)
    ]


def test_nothing_in_the_code_loads_code():
    """What ruff's rules S301, S307, S310, S314, S506 and S602 do not see."""
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                pytest.fail(f"{path}: trust_remote_code")
            if not isinstance(node, ast.Call):
                continue
            options = {k.arg: k.value for k in node.keywords}
            called = ast.unparse(node.func)
            where = f"{path}:{node.lineno}: {called}"
            assert called not in FORBIDDEN, where
            if called == "torch.load" or called.endswith("load_from_checkpoint"):
                assert ast.unparse(options.get("weights_only", ast.Constant(None))) == "True", where


def test_no_option_takes_any_function():
    """jsonargparse gives a bare `Callable` whatever a configuration names, such as os.system."""
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                for method in node.body:
                    if isinstance(method, ast.FunctionDef) and method.name == "__init__":
                        for argument in method.args.args + method.args.kwonlyargs:
                            hint = ast.unparse(argument.annotation) if argument.annotation else ""
                            assert hint not in ("Callable", "typing.Callable"), f"{path}: {hint}"


@pytest.mark.parametrize(("package", "floor"), [("lightning", "2.6.6"), ("torch", "2.10")])
def test_what_is_installed_is_above_the_security_floors(package, floor):
    assert Version(importlib.metadata.version(package)) >= Version(floor)
    stated = (ROOT / "setup.cfg").read_text()
    assert f"{package}>={floor}" in stated


def test_ruff_watches_over_unsafe_calls():
    rules = (ROOT / "ruff.toml").read_text()
    for rule in ("S301", "S307", "S310", "S314", "S324", "S506", "S602"):
        assert rule in rules


def test_the_reward_network_under_another_name_is_no_judge(
    tiny_pipeline, tiny_classifiers, tmp_path
):
    """Cut to four heads, it reads the artifacts as the reward does."""
    whole = torch.load(tiny_classifiers["reward"], weights_only=True)
    for name, tensor in whole["state_dict"].items():
        if name.startswith("network.classifier.") or name == "positive_weight":
            whole["state_dict"][name] = tensor[:4].clone()
    whole["hyper_parameters"]["attributes"] = ATTRIBUTES[:4]
    judge = tmp_path / "judge.ckpt"
    torch.save(whole, judge)
    load_classifier(judge, heads="judge")
    plain, within = (AttributeMatch(tiny_classifiers["reward"]) for _ in range(2))
    for reward in (plain, RewardSum([Brightness(), RewardSum([within])])):
        networks = tiny_classifiers | {"judge": str(judge)}
        module = tiny_ddpo(tiny_pipeline, networks, reward=reward)
        with pytest.raises(UserError, match="of its weights from the reward network") as error:
            module.configure_model()
        assert str(judge) in str(error.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--model.eta=-1"], ["eta=-1.0", "(0, 1]", "--model.eta 1"]),
        (["--trainer.precision=16-mixed"], ["16-mixed", "32-true and bf16-mixed", "--trainer"]),
        (["--trainer.precision=16-true"], ["16-true", "32-true and bf16-mixed"]),
        (["--data.samples_per_epoch=20", "--model.updates=3"], ["20 samples", "18 and 21"]),
    ],
)
def test_what_cannot_work_is_refused_before_a_model_is_built(
    tiny_pipeline, tiny_classifiers, tmp_path, monkeypatch, options, says
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(TextToImage, "configure_model", lambda self: pytest.fail("too late"))
    started = time.monotonic()
    with pytest.raises(UserError) as error:
        in_process(*ddpo(tmp_path / "run", tiny_pipeline, tiny_classifiers), *options)
    assert time.monotonic() - started < 10
    for part in says:
        assert part in str(error.value)


def test_networks_of_before_the_package_load_although_their_classes_were_named_otherwise(
    tiny_pipeline, tiny_classifiers, tmp_path
):
    def former(path, name, **known):
        whole = torch.load(path, weights_only=True)
        whole["hyper_parameters"] |= known | {
            "_instantiator": "lightning.pytorch.cli.instantiate_module",
            "_class_path": f"lightning_modules.{name}",
        }
        torch.save(whole, tmp_path / "former.ckpt")
        return tmp_path / "former.ckpt"

    kept = load_classifier(tiny_classifiers["reward"])
    path = former(tiny_classifiers["reward"], "AttributeClassifier")
    for name, tensor in load_classifier(path).state_dict().items():
        assert torch.equal(tensor, kept.state_dict()[name]), name
    module = tiny_ddpo(tiny_pipeline, tiny_classifiers)
    trainer = quiet_trainer(tmp_path, max_epochs=1)
    trainer.fit(module, prompts())
    trainer.save_checkpoint(tmp_path / "new.ckpt")
    match = {"classifier": tiny_classifiers["reward"]}
    reward = {"class_path": "lightning_modules.rewards.AttributeMatch", "init_args": match}
    again = DDPO.load_from_checkpoint(former(tmp_path / "new.ckpt", "DDPO", reward=reward))
    assert isinstance(again.reward, AttributeMatch)
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, module.state_dict()[name]), name
