"""Every evaluation scores what the run trained, says which file that is, or refuses."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rl4med_ddpo.fault_tolerance.checkpoint_io import DurableCheckpointIO
from rl4med_ddpo.foundation.errors import UserError
from rl4med_ddpo.foundation.hashes import sha256_of
from rl4med_ddpo.lightning_modules import DDPO, AttributeClassifier
from rl4med_ddpo.lightning_modules.classifier import load_classifier
from rl4med_ddpo.lightning_modules.diffusion.lora import load_policy
from rl4med_ddpo.lightning_modules.pipelines.load import load_pipeline
from rl4med_ddpo.lightning_modules.trained_weights import scored_checkpoint, weights_that_fit
from support.attribute_images import AttributeImageData
from support.command_line import ddpo, in_process
from support.tiny import prompts, tiny_ddpo
from support.trainers import quiet_trainer

WEIGHTS = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def run(tiny_pipeline, tiny_classifiers, tmp_path_factory):
    """A finished DDPO run of the command line: its options, its folder, the policy's weights."""
    folder = tmp_path_factory.mktemp("scored") / "ddpo"
    policy = f"--model.policy={folder / 'policy'}"
    more = ("--trainer.max_epochs=2", policy)
    options = ddpo(folder, tiny_pipeline, tiny_classifiers, *more)
    trained = in_process(*options).model
    return options[1:], folder, adapters(trained)


def adapters(module):
    return {n: p.detach().clone() for n, p in module.named_parameters() if "lora_" in n}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_the_policy_is_scored_and_named(run, capfd, caplog, tmp_path):
    options, folder, trained = run
    with caplog.at_level("INFO"):
        cli = in_process("validate", *options, f"--trainer.default_root_dir={tmp_path}")
    assert same(adapters(cli.model), trained)
    file = folder / "policy" / WEIGHTS
    said = caplog.text + "".join(capfd.readouterr())
    assert f"{file} (sha256 {sha256_of(file)[:12]})" in said


def test_the_best_checkpoint_is_scored_without_a_policy(run):
    options, folder, trained = run
    cli = in_process("validate", *options, "--model.policy=null", "--ckpt_path=best")
    assert cli.model.trained_from == str(folder / "checkpoints" / "best.ckpt")
    assert same(adapters(cli.model), trained)


def test_the_card_of_the_run_claims_no_more_than_its_data_and_settings(run, tiny_pipeline):
    card = (run[1] / "policy" / "README.md").read_text()
    assert "base_model" not in card
    assert "ISIC" not in card
    assert f"**Starts from:** `{tiny_pipeline}`" in card
    assert ", num_inference_steps=4, guidance_scale=3.0, eta=1.0)" in card


def test_a_policy_that_is_not_whole_is_refused(run, tiny_pipeline, tmp_path):
    _, folder, _ = run
    whole = load_file(folder / "policy" / WEIGHTS)
    some = dict(list(whole.items())[:4])
    with safe_open(folder / "policy" / WEIGHTS, "pt") as file:
        described = file.metadata()
    for metadata in (described, None):
        save_file(some, tmp_path / WEIGHTS, metadata)
        with pytest.raises(UserError, match=f"holds 4 of {len(whole)} tensors"):
            load_policy(load_pipeline(tiny_pipeline).unet, tmp_path)
    save_file(whole, tmp_path / WEIGHTS)
    load_policy(load_pipeline(tiny_pipeline).unet, tmp_path)


def test_python_reads_the_policy_without_a_trainer(run, tiny_pipeline, tiny_classifiers):
    _, folder, trained = run
    module = tiny_ddpo(tiny_pipeline, tiny_classifiers, DDPO, policy=str(folder / "policy"))
    module.configure_model()
    assert same(adapters(module), trained)
    with pytest.raises(UserError, match="not trained further"):
        quiet_trainer(folder, max_epochs=1).fit(module, prompts())
    loaded = DDPO.load_from_checkpoint(
        folder / "checkpoints" / "best.ckpt", reward=module.reward, policy="not there"
    )
    assert same(adapters(loaded), trained)
    assert loaded.trained_from == str(folder / "checkpoints" / "best.ckpt")


@pytest.mark.parametrize(("command", "stage"), [("test", "classifier"), ("validate", "sd")])
def test_weights_that_were_not_trained_are_refused(command, stage, tmp_path):
    with pytest.raises(UserError, match="no trained weights to score") as error:
        in_process(command, f"--config=demo/{stage}.yaml", f"--trainer.default_root_dir={tmp_path}")
    assert str(tmp_path / "checkpoints") in str(error.value)
    assert "--ckpt_path FILE" in str(error.value)
    assert not (tmp_path / "results").exists()


def test_weights_of_another_network_are_refused_in_words(tiny_classifiers):
    reward, judge = (load_classifier(tiny_classifiers[name]) for name in ("reward", "judge"))
    with (
        pytest.raises(UserError, match=r"x.ckpt do not fit this Attribute.*: Missing key"),
        weights_that_fit(reward, "x.ckpt"),
    ):
        reward.load_state_dict(judge.state_dict())


def test_python_too_refuses_a_classifier_without_weights(tmp_path):
    with pytest.raises(UserError, match="no trained weights to score"):
        quiet_trainer(tmp_path).validate(
            AttributeClassifier("test_resnet", False, image_size=32), AttributeImageData(0, 8)
        )


def test_the_best_checkpoint_is_found_by_its_name_or_by_the_newest_state(tmp_path):
    def trainer(name, folder=tmp_path):
        best = ModelCheckpoint(folder, name, monitor="val/loss")
        newest = ModelCheckpoint(folder, "newest", save_on_train_epoch_end=True)
        plugins = {"enable_checkpointing": True, "plugins": [DurableCheckpointIO()]}
        return quiet_trainer(folder, best, newest, max_epochs=2, **plugins)

    def network():
        return AttributeClassifier("test_resnet", False, image_size=32)

    for name in ("best", "{epoch}"):
        folder = tmp_path / name.strip("{}")
        first = trainer(name, folder)
        first.fit(network(), AttributeImageData(32, 8))
        kept = first.checkpoint_callback.best_model_path
        again = trainer(name, folder)
        assert scored_checkpoint(again, network(), "trained") == kept
        assert scored_checkpoint(again, network(), "last") == str(folder / "newest.ckpt")
        assert scored_checkpoint(again, network(), None) is None
    with pytest.raises(UserError, match=r"no checkpoint nowhere\.ckpt. Allowed .* best, last or"):
        scored_checkpoint(again, network(), "nowhere.ckpt")
    (scored,) = again.validate(network(), AttributeImageData(32, 8), ckpt_path=kept, verbose=False)
    assert scored["val/loss"] == pytest.approx(first.checkpoint_callback.best_model_score.item())
