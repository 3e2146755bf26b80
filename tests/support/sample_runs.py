import time

from rl4med_ddpo.callbacks.sample_folder import SampleFolder
from rl4med_ddpo.datamodules.images import INPUT
from rl4med_ddpo.datamodules.prompts import ISICPromptDataModule
from rl4med_ddpo.lightning_modules import DDPO, AttributeMatch
from support.trainers import quiet_trainer

STEPS, BATCH = 4, 8


def module_of(networks, sample_batch=BATCH, reward=None, **options):
    return DDPO(
        networks["pipeline"],
        judge=networks["judge"],
        reward=reward or AttributeMatch(networks["reward"]),
        **({"steps": STEPS, "guidance": 3.0, "seed": 0} | options),
        sample_batch=sample_batch,
    )


def predict(folder, networks, per_prompt=2, batch=BATCH, prompts="balanced", **options):
    data = ISICPromptDataModule(
        prompts=prompts,
        samples_per_epoch=32,
        test_samples_per_prompt=per_prompt,
        predict_batch_size=batch,
    )
    trainer = quiet_trainer(folder.parent, SampleFolder(str(folder)))
    trainer.predict(module_of(networks, **options), data, return_predictions=False)


def command(run_folder, networks, *more):
    """What `predict` above does, as a command line that draws into <run_folder>/samples."""
    options = {
        "model.pipeline": networks["pipeline"],
        "model.policy": "null",
        "model.judge": networks["judge"],
        "model.reward.classifier": networks["reward"],
        "model.steps": STEPS,
        "model.guidance": 3.0,
        "model.sample_batch": BATCH,
        "data.test_samples_per_prompt": 2,
        "trainer.default_root_dir": run_folder,
        "trainer.logger": "false",
    }
    given = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    return ["predict", "--config", "demo/ddpo.yaml", *given, *more]


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def times(folder):
    return {p.name: p.stat().st_mtime_ns for p in (folder / INPUT).glob("*.png")}


def copy_of(folder, target):
    for name, data in contents(folder).items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes(data)
    return target


def wait_for_images(folder, count, process_ended, seconds=60):
    until = time.monotonic() + seconds
    while len(times(folder)) < count and not process_ended() and time.monotonic() < until:
        time.sleep(0.002)
