import sys

import pytest
import torch
import yaml

from rl4med_ddpo.command_line.main import user_message
from rl4med_ddpo.command_line.parser import CONFIGS
from rl4med_ddpo.foundation.errors import UserError
from support.command_line import ROOT, as_process, classifier, ddpo, in_process
from support.dermoscopy import PROMPTS


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def printed(capsys, *args):
    with pytest.raises(SystemExit) as end:
        in_process(*args, "--print_config")
    assert not end.value.code
    return yaml.safe_load(capsys.readouterr().out)


def refused(capsys, *args):
    with pytest.raises(SystemExit) as end:
        in_process(*args)
    assert end.value.code == 2
    return capsys.readouterr().err


def test_shipped_configurations_are_found_from_anywhere(capsys):
    for name in ("ddpo.yaml", str(CONFIGS / "ddpo.yaml")):
        assert printed(capsys, "fit", "--config", name)["model"]["class_path"].endswith("DDPO")


def test_a_file_here_comes_before_a_shipped_one(capsys, tmp_path):
    (tmp_path / "ddpo.yaml").write_text("model: {class_path: DDPO, init_args: {steps: 3}}")
    config = printed(capsys, "fit", "--config=ddpo.yaml", "--data=ISICPromptDataModule")
    assert config["model"]["init_args"]["steps"] == 3
    assert config["model"]["init_args"]["updates"] == 2


def test_values_follow_each_other_and_the_command_line_comes_last(capsys, tmp_path):
    (tmp_path / "small.yaml").write_text(
        "seed_everything: 5\n"
        "model: {init_args: {steps: 10, sample_batch: 3}}\n"
        "trainer: {default_root_dir: here}\n"
    )
    config = printed(
        capsys, "fit", "--config=ddpo.yaml", "--config=small.yaml",
        "--model.steps=7", "--trainer.default_root_dir=there",
    )  # fmt: skip
    model, trainer = config["model"]["init_args"], config["trainer"]
    assert (model["steps"], model["sample_batch"], model["lora_rank"]) == (7, 3, 4)
    # interpolated after all files and options are merged
    assert model["seed"] == config["data"]["init_args"]["seed"] == 5
    assert model["policy"] == "there/policy"
    assert trainer["logger"]["init_args"]["save_dir"] == "there"
    saved = [c["init_args"].get("dirpath") for c in trainer["callbacks"]]
    assert "there/checkpoints" in saved
    assert "there/policy" in saved


def test_another_class_keeps_what_the_configuration_refers_to(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.path", [*sys.path])
    (tmp_path / "own_data.py").write_text(
        "from rl4med_ddpo.datamodules import ISICPromptDataModule\n"
        "class Own(ISICPromptDataModule):\n    pass\n"
    )
    config = printed(
        capsys, "fit", "--config=ddpo.yaml", "--model=OnePassDDPO", "--data=own_data.Own",
        "--seed_everything=7", "--model.sample_batch=3",
    )  # fmt: skip
    model, data = config["model"], config["data"]
    assert model["class_path"].endswith("OnePassDDPO")
    assert data["class_path"] == "own_data.Own"
    assert model["init_args"]["seed"] == data["init_args"]["seed"] == 7
    assert data["init_args"]["predict_batch_size"] == 3


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--model.clip_rang=1"], ["clip_rang", "Did you mean clip_range?"]),
        (["--model.init_args.stepz=1"], ["stepz", "Did you mean steps?"]),
        (["--model=DPO"], ["class named DPO", "Did you mean DDPO?"]),
        (["--trainer.max_epoch=1"], ["trainer.max_epoch", "Did you mean trainer.max_epochs?"]),
        (["--trainr.max_epochs=1"], ["trainr", "Did you mean trainer.max_epochs?"]),
        (["--model.steps=many"], ["steps", "many"]),
        (["--model.baseline=groups"], ["baseline", "groups", "window"]),
        (["--config=ddpoo.yaml"], ["ddpoo.yaml", "ddpo.yaml", "classifier.yaml", "demo/sd.yaml"]),
        (["--config=ddpo.yml"], ["no configuration ddpo.yml", "Did you mean ddpo.yaml?"]),
        (["--model.optimizer.lr=1e-5x"], ["--model.optimizer.lr is 1e-5x", "a number"]),
        (["--model.optimizer=Adamm"], ["no class named Adamm", "Did you mean Adam?"]),
        (["--model.optimizer=torch.optim.Adamm"], ["torch.optim named Adamm", "Did you mean Adam"]),
        (["--trainer.callbacks+=LearningRateMonitr"], ["Did you mean LearningRateMonitor?"]),
        (["--trainer.logger=CSVLoger"], ["Did you mean CSVLogger?"]),
        (["--model.reward=Brightnes"], ["--model.reward", "Did you mean Brightness?"]),
        (["--model.train=loro"], ["--model.train is loro; allowed: one of lora, full"]),
        (["--model.eta=true"], ["--model.eta is True; allowed: a number"]),
        (["--seed_everything=true"], ["a run is repeated by its number"]),
    ],
)
def test_a_typing_mistake_gets_one_message_with_the_near_name(capsys, args, says):
    error = refused(capsys, "fit", "--config=ddpo.yaml", *args)
    assert "Traceback" not in error
    for part in says:
        assert part in error


OWN = """
from rl4med_ddpo.lightning_modules.rewards import Reward, Rewards


class Mine(Reward):
    def forward(self, images, conditions):
        return Rewards(images.mean(dim=(1, 2, 3)), {})
"""


def test_code_beside_the_run_is_found_and_its_mistakes_are_named(
    capsys, tmp_path, tiny_pipeline, tiny_classifiers, monkeypatch
):
    monkeypatch.setattr("sys.path", [*sys.path])
    (tmp_path / "own_module.py").write_text(OWN)
    (tmp_path / "broken_module.py").write_text("def f(:")
    for name, says in {
        "own_module.Mien": "no class in own_module named Mien. Did you mean Mine?",
        "broken_module.X": "broken_module.X cannot be loaded: invalid syntax",
        "no_module.X": f"is looked for in the working directory, {tmp_path}",
    }.items():
        for option in (f"--model.reward={name}", f"--trainer.callbacks+={name}"):
            assert says in refused(capsys, "fit", "--config=ddpo.yaml", option)
    args = ddpo(tmp_path / "run", tiny_pipeline, tiny_classifiers, "--model.reward=own_module.Mine")
    args = [arg for arg in args if "reward.classifier" not in arg]
    cli = in_process(*args, "--model.steps=2", "--trainer.max_epochs=1")
    assert type(cli.model.reward).__name__ == "Mine"


def test_the_home_folder_is_meant_by_a_tilde_in_every_path(isic, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "isic").symlink_to(isic)
    (tmp_path / "own.yaml").write_text("model: {init_args: {image_size: 32}}")
    in_process(
        *classifier("~/runs/here", "~/isic", "--data.copies=~/copies", "--config=~/own.yaml"),
        "--trainer.max_epochs=1", "--trainer.limit_train_batches=1",
        "--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.dirpath=~/kept",
    )  # fmt: skip
    for made in ("runs/here/checkpoints", "runs/here/tensorboard", "copies", "kept"):
        assert any((tmp_path / made).iterdir()), made
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize(
    ("name", "option", "says"),
    [
        ("ddpo.yaml", "--data.samples_per_epoch=250", "Nearest that works: 224 and 256"),
        ("ddpo.yaml", "--model.eta=2", "allowed is (0, 1]; try --model.eta 1"),
        ("ddpo.yaml", "--model.lora_rank=0", "allowed is at least 1; try --model.lora_rank 4"),
        ("ddpo.yaml", "--data.vocabulary.any_of=[]", "needs at least one attribute"),
        ("sd.yaml", "--model.caption_dropout=1", "allowed are 0 to below 1"),
        ("sd.yaml", "--data.threshold=2", "threshold in [0, 1)"),
        ("classifier.yaml", "--model.backbone=efficientnet_b00", "efficientnet_b0"),
        ("classifier.yaml", "--model.warmup=1", "a share of the run in [0, 1)"),
        ("base/autoencoder.yaml", "--model.layers=0", "at least one layer"),
        ("sd.yaml", "--watchdog.silence=0", "silence"),
        ("classifier.yaml", "--trainer.max_epochs=-2", "max_epochs"),
    ],
)
def test_what_a_constructor_refuses_arrives_as_its_one_message(name, option, says):
    with pytest.raises(UserError) as error:
        in_process("fit", f"--config={name}", option)
    message = str(error.value)
    assert says in message
    assert "Traceback" not in message
    assert len(message.splitlines()) < 8


def test_a_damaged_configuration_is_named(capsys, tmp_path):
    for content in ("model: [1", "- a\n- b", "\0"):
        (tmp_path / "broken.yaml").write_text(content)
        error = refused(capsys, "fit", "--config=broken.yaml")
        assert "the configuration broken.yaml cannot be read: " in error


def test_a_command_without_its_configuration_says_which_there_are(capsys):
    error = refused(capsys, "fit")
    for part in ("fit needs a configuration: --config NAME", "ddpo.yaml", "demo/sd.yaml"):
        assert part in error


def test_the_help_lists_every_command(capsys):
    with pytest.raises(SystemExit) as end:
        in_process("--help")
    assert not end.value.code
    shown = capsys.readouterr().out
    for command in ("fit", "validate", "test", "predict", "describe", "report"):
        assert command in shown.split()


def test_an_unknown_command_gets_the_known_ones(capsys):
    error = refused(capsys, "fitt", "--config=ddpo.yaml")
    for part in ("fitt. Did you mean fit?", "validate", "test", "predict", "describe", "report"):
        assert part in error


def test_with_nothing_prepared_it_says_what_to_run(tmp_path):
    done = as_process(tmp_path, "fit", "--config", "ddpo.yaml", "--trainer.accelerator=cpu")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    for part in (
        "3 of the 3 things",
        "runs/sd/pipeline", "rl4med-ddpo fit --config sd.yaml",
        "runs/classifier/checkpoints/best.ckpt", "rl4med-ddpo fit --config classifier.yaml",
        "runs/judge/checkpoints/best.ckpt", "rl4med-ddpo fit --config judge.yaml",
        "make demo",
    ):  # fmt: skip
        assert part in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "command",
    [
        ["fit", "--config=ddpo.yaml", "--trainer.devices=2", "--trainer.strategy=ddp"],
        ["predict", "--config=ddpo.yaml", "--trainer.devices=2", "--trainer.strategy=ddp"],
        ["fit", "--config=classifier.yaml", "--data.threshold=2"],
    ],
)
def test_a_refused_run_starts_no_process_and_leaves_nothing(command, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "lightning.pytorch.strategies.launchers._SubprocessScriptLauncher._call_children_scripts",
        lambda _: pytest.fail("a process was started"),
    )
    with pytest.raises(UserError):
        in_process(*command, "--trainer.accelerator=cpu")
    assert not list(tmp_path.iterdir())
    # the folder is another run's now
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "notes").write_text("mine")
    with pytest.raises(UserError):
        in_process(*command, "--trainer.accelerator=cpu")
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["notes"]


def test_errors_of_workers_are_cut_to_their_message(tmp_path):
    class Broken(torch.utils.data.Dataset):
        def __len__(self):
            return 1

        def __getitem__(self, i):
            raise UserError("the image x.jpg cannot be read.\n  Copy it again.")

    with pytest.raises(UserError) as error:
        next(iter(torch.utils.data.DataLoader(Broken(), num_workers=1)))
    assert "Traceback" in str(error.value)
    assert user_message(error.value) == "the image x.jpg cannot be read.\n  Copy it again."
    assert user_message(UserError("plain: message")) == "plain: message"


def test_options_that_another_model_lacks_are_named(capsys):
    with (
        pytest.warns(
            UserWarning, match=r"DRaFT has no such options .* clip_range, std_floor, time"
        ),
        pytest.raises(SystemExit),
    ):
        in_process("fit", "--config=demo/ddpo.yaml", "--model=DRaFT", "--print_config")
    assert "class_path: rl4med_ddpo.lightning_modules.DRaFT" in capsys.readouterr().out


def test_describe_prints_the_tables(capsys, isic):
    in_process("describe", "--config=classifier.yaml", f"--data.root={isic}")
    said = capsys.readouterr().out
    assert "64 melanomas and nevi, split: paper (seed 42)\n" in said
    assert "hair" in said


def tiny_options(name, pipeline, classifiers, isic):
    """Options that make a shipped configuration run in seconds."""
    kind = name.rpartition("/")[2]
    images = [
        f"--data.root={isic}", "--data.size=16", "--data.batch_size=8", "--data.num_workers=0",
    ]  # fmt: skip
    if kind in ("classifier.yaml", "judge.yaml", "perceptual.yaml", "reader.yaml"):
        backbone = "test_resnet" if kind in ("judge.yaml", "reader.yaml") else "test_efficientnet"
        copies = "null" if name.startswith(("demo/", "base/")) else "copies"
        return [
            f"--model.backbone={backbone}", "--model.pretrained=false", "--model.image_size=32",
            *images, f"--data.copies={copies}",
        ]  # fmt: skip
    if kind == "autoencoder.yaml":
        return [
            f"--model.pipeline={pipeline}", f"--model.perceptual={classifiers['reward']}", *images,
            "--trainer.val_check_interval=2",
        ]  # fmt: skip
    sampled = [f"--model.pipeline={pipeline}", "--model.steps=2"]
    if kind in ("sd.yaml", "unet.yaml"):
        cache = ["--model.cache=cache"] if kind == "unet.yaml" else []
        return [*sampled, *images, *cache]
    own = ["--model.clip_range=0.1", "--model.timestep_window=null", "--model.rollout_noise=all"]
    return [
        *sampled, *(own if kind == "ddpo.yaml" else []), f"--model.judge={classifiers['judge']}",
        f"--model.reward.classifier={classifiers['reward']}", "--model.guidance=3",
        f"--data.prompts=[{', '.join(map(repr, PROMPTS[::4]))}]",
        "--data.samples_per_epoch=16", "--data.validation_samples_per_prompt=1",
    ]  # fmt: skip


SHIPPED = [
    str(path.relative_to(CONFIGS))
    for path in sorted(CONFIGS.rglob("*.yaml"))
    if path.stem != "vocabulary"
]


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_configuration_trains(
    name, tiny_pipeline, tiny_classifiers, isic, tmp_path, monkeypatch
):
    monkeypatch.setenv("DEMO", str(tmp_path / "demo"))
    cli = in_process(
        "fit", f"--config={name}", *tiny_options(name, tiny_pipeline, tiny_classifiers, isic),
        f"--trainer.default_root_dir={tmp_path / 'run'}", "--trainer.accelerator=cpu",
        "--trainer.max_epochs=1", "--trainer.limit_train_batches=2",
        "--trainer.limit_val_batches=1",
        "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false",
    )  # fmt: skip
    run = tmp_path / "run"
    assert cli.trainer.global_step in (1, 2, 4)
    assert list(run.rglob("config_fit.yaml"))
    assert list((run / "tensorboard").glob("events*"))
    assert list((run / "checkpoints").glob("*.ckpt"))
    assert not (ROOT / "lightning_logs").exists()
    for leftover in (tmp_path / "lightning_logs", tmp_path / "runs"):
        assert not leftover.exists()


def test_every_option_of_ddpo_is_one_of_the_configuration(
    tiny_pipeline, tiny_classifiers, tmp_path
):
    (tmp_path / "all.yaml").write_text(
        f"""
model:
  init_args:
    reward:
      class_path: RewardSum
      init_args:
        weights: [1.0, 0.1]
        rewards:
          - class_path: AttributeProbability
            init_args: {{classifier: {tiny_classifiers["reward"]}, weights: {{ink: 2.0}}}}
          - class_path: Brightness
    optimizer: {{class_path: torch.optim.SGD, init_args: {{lr: 0.1}}}}
    clip_range: [0.01, 0.02]
    clip_dimensions: 256
    kl_weight: 0.01
    diversity_weight: 0.1
    timestep_fraction: 0.5
    timestep_window: [0, 3]
    training_steps: 3
    rollout_noise: window
    step_weights: equal
    trust_region: kl
    max_kl: 0.1
    guidance_in_training: false
    old_log_probs: training
    gradient_checkpointing: true
    trajectory: host
    micro_batch: auto
    max_skipped: 1
trainer:
  max_epochs: 1
"""
    )
    args = ddpo(tmp_path / "run", tiny_pipeline, tiny_classifiers)
    args = [arg for arg in args if "reward.classifier" not in arg and "clip_range" not in arg]
    cli = in_process(
        *args, f"--config={tmp_path / 'all.yaml'}", "--trainer.check_val_every_n_epoch=1"
    )
    policy, metrics = cli.model, cli.trainer.callback_metrics
    # 4 x 8 x 8 latents have the 256 dimensions that the range is meant for
    assert policy.clip_range == (0.01, 0.02)
    assert policy.trained_steps == 2
    assert policy.micro_batch in (4, 8, 16)
    named = {"1_AttributeProbability", "2_Brightness", "diversity"}
    assert {name for name in metrics if name.startswith("reward_share/")} == {
        f"reward_share/{name}" for name in named
    }
    assert metrics["policy/reference_kl"] > 0
    assert "val/judge_fall" in metrics
    assert cli.trainer.global_step == 2
