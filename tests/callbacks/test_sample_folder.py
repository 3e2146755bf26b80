import json
import os
import random
import re
import signal
import time

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from rl4med_ddpo.callbacks.sample_folder import SETTINGS, SampleFolder
from rl4med_ddpo.callbacks.sample_png import sample_id
from rl4med_ddpo.command_line import main
from rl4med_ddpo.datamodules.images import INPUT
from rl4med_ddpo.datamodules.isic import ISICDataModule
from rl4med_ddpo.datamodules.prompts import ISICPromptDataModule
from rl4med_ddpo.datamodules.sample_tables import MANIFEST
from rl4med_ddpo.foundation.errors import UserError
from rl4med_ddpo.foundation.progress import progress
from rl4med_ddpo.foundation.randomness import key
from rl4med_ddpo.lightning_modules import Brightness
from rl4med_ddpo.lightning_modules.classifier import load_classifier
from rl4med_ddpo.lightning_modules.diffusion.lora import ADAPTER, add_lora, save_lora
from rl4med_ddpo.lightning_modules.pipelines.load import load_pipeline
from support.dermoscopy import (
    ARTIFACTS,
    ATTRIBUTES,
    CONDITIONS,
    PROMPTS,
    condition_of,
    short_name,
)
from support.forked import start_forked
from support.sample_runs import (
    command,
    contents,
    copy_of,
    module_of,
    predict,
    times,
    wait_for_images,
)
from support.trainers import quiet_trainer


@pytest.fixture(scope="module")
def networks(tiny_pipeline, tiny_classifiers):
    return {"pipeline": tiny_pipeline, **tiny_classifiers}


@pytest.fixture(scope="module")
def one_go(networks, tmp_path_factory):
    """64 samples drawn without interruption on one process."""
    folder = tmp_path_factory.mktemp("one_go") / "samples"
    predict(folder, networks)
    return folder


def test_a_killed_command_finished_on_two_processes_leaves_what_one_go_does(
    networks, one_go, tmp_path
):
    folder = tmp_path / "samples"
    killed = start_forked(main, command(tmp_path, networks))
    wait_for_images(folder, 5, lambda: os.waitpid(killed, os.WNOHANG)[0])
    os.kill(killed, signal.SIGKILL)
    assert os.waitpid(killed, 0)[1] == signal.SIGKILL
    before = times(folder)
    assert 0 < len(before) < 64
    assert not (folder / MANIFEST).exists()

    two = ("--trainer.devices", "2", "--trainer.strategy", "ddp_fork")
    main(command(tmp_path, networks, *two))
    assert contents(folder) == contents(one_go)
    after = times(folder)
    assert {name: after[name] for name in before} == before


def test_five_kills_at_random_moments_lose_and_repeat_nothing(networks, one_go, tmp_path):
    folder, moments = tmp_path / "samples", random.Random(0)
    for _ in range(5):
        there = times(folder)
        child = start_forked(predict, folder, networks)
        wait_for_images(
            folder,
            len(there) + moments.randint(1, 11),
            lambda pid=child: os.waitpid(pid, os.WNOHANG)[0],
        )
        time.sleep(moments.uniform(0, 0.02))
        try:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        except (ProcessLookupError, ChildProcessError):
            pass
        now = times(folder)
        assert {name: now[name] for name in there} == there
    predict(folder, networks)
    assert contents(folder) == contents(one_go)


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "foreign", "another", "gone"])
def test_a_damaged_image_is_drawn_again_and_no_other(networks, one_go, tmp_path, damage):
    folder = copy_of(one_go, tmp_path / "samples")
    paths = sorted((folder / INPUT).iterdir())
    path, data = paths[20], bytearray(paths[20].read_bytes())
    if damage == "cut":
        path.write_bytes(data[:-20])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "flipped":
        data[data.index(b"IDAT") + 40] ^= 1
        path.write_bytes(data)
    elif damage == "foreign":
        Image.new("RGB", (16, 16)).save(path)
    elif damage == "another":
        path.write_bytes(paths[21].read_bytes())
    else:
        path.unlink()
    before = times(folder)
    predict(folder, networks)
    assert contents(folder) == contents(one_go)
    changed = {name for name, t in times(folder).items() if before.get(name) != t}
    assert changed == {path.name}


def test_more_samples_join_those_that_are_there(networks, tmp_path):
    """The last batches are partly full, at other places in the two runs."""
    options = {"batch": 24, "sample_batch": 12, "steps": 2}
    predict(tmp_path / "grown", networks, per_prompt=1, **options)
    predict(tmp_path / "grown", networks, per_prompt=2, **options)
    predict(tmp_path / "at_once", networks, per_prompt=2, **options)
    assert contents(tmp_path / "grown") == contents(tmp_path / "at_once")


def test_an_image_is_the_same_whatever_other_prompts_are_drawn(networks, one_go, tmp_path):
    """Prompts 0 and 1 alone: sample 0 and 1 have their prompt and index in both folders."""
    predict(tmp_path / "two", networks, prompts=list(PROMPTS[:2]), batch=4)
    for index in (0, 1):
        name = f"{INPUT}/{sample_id(short_name(CONDITIONS[index]), index)}.png"
        assert (tmp_path / "two" / name).read_bytes() == (one_go / name).read_bytes()


@pytest.fixture(scope="module")
def adapters(networks, tmp_path_factory):
    """A policy that LoRA training might have left."""
    folder = tmp_path_factory.mktemp("policy")
    unet = load_pipeline(networks["pipeline"]).unet
    add_lora(unet, rank=2, seed=0)
    draw = torch.Generator().manual_seed(0)
    for name, weight in unet.named_parameters():
        if f"lora_B.{ADAPTER}" in name:
            torch.nn.init.normal_(weight, std=0.5, generator=draw)
    save_lora(unet, folder)
    return str(folder)


def test_adapters_are_drawn_from_with_the_same_noise(networks, one_go, adapters, tmp_path):
    predict(tmp_path / "samples", networks, policy=adapters)
    aligned = pd.read_csv(tmp_path / "samples" / MANIFEST)
    start = pd.read_csv(one_go / MANIFEST)
    assert (aligned["noise_key"] == start["noise_key"]).all()
    drawn, other = contents(tmp_path / "samples"), contents(one_go)
    assert drawn.keys() == other.keys()
    assert all(drawn[name] != data for name, data in other.items() if name.startswith(INPUT))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 1}, "seed: 0 there, 1 now"),
        ({"steps": 5}, "steps: 4 there, 5 now"),
        ({"guidance": 5.0}, "guidance: 3.0 there, 5.0 now"),
        ({"reward": Brightness()}, "reward: AttributeMatch there, Brightness now"),
        ({"policy": "adapters"}, r"digest of unet: \w+ there, \w+ now"),
    ],
    ids=lambda value: str(next(iter(value))) if isinstance(value, dict) else "",
)
def test_samples_of_other_settings_are_not_mixed(
    networks, one_go, adapters, tmp_path, options, message
):
    folder = copy_of(one_go, tmp_path / "samples")
    (folder / INPUT / f"{sample_id(short_name(CONDITIONS[0]), 0)}.png").unlink()
    before = contents(folder)
    if "policy" in options:
        options = {"policy": adapters}
    with pytest.raises(UserError, match=message) as error:
        predict(folder, networks, **options)
    assert "another folder" in str(error.value)
    assert contents(folder) == before


def test_settings_without_an_image_keep_nobody_from_drawing(networks, one_go, tmp_path):
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / SETTINGS).write_text(json.dumps({"steps": 1}))
    predict(tmp_path / "samples", networks, prompts=[PROMPTS[0]], per_prompt=1)
    there = json.loads((tmp_path / "samples" / SETTINGS).read_text())
    assert there == json.loads((one_go / SETTINGS).read_text())


def test_samples_that_were_not_asked_for_now_are_counted(networks, tmp_path, caplog):
    caplog.set_level("INFO", "lightning.pytorch")
    for per_prompt in (3, 2):
        predict(tmp_path / "samples", networks, prompts=[PROMPTS[0]], per_prompt=per_prompt)
    assert "2 samples in" in caplog.text
    assert "; 1 more lie there, which were not asked for now" in caplog.text


def test_images_of_unknown_origin_are_refused(networks, one_go, tmp_path):
    folder = copy_of(one_go, tmp_path / "samples")
    (folder / SETTINGS).unlink()
    with pytest.raises(UserError, match="nobody knows how they were drawn"):
        predict(folder, networks)


def test_a_folder_that_cannot_be_written_is_refused(networks, tmp_path):
    (tmp_path / "samples").write_text("a file")
    with pytest.raises(UserError, match="cannot write samples to"):
        predict(tmp_path / "samples", networks)


def test_a_reward_without_a_network_leaves_its_columns_out(networks, tmp_path):
    predict(tmp_path / "s", networks, prompts=[PROMPTS[0]], reward=Brightness(), steps=1)
    manifest = pd.read_csv(tmp_path / "s" / MANIFEST)
    assert not [c for c in manifest if c.startswith("reward_")]
    image = Image.open(tmp_path / "s" / INPUT / f"{manifest['id'][0]}.png")
    assert manifest["reward"][0] == pytest.approx(np.asarray(image).mean() / 255, abs=1e-6)


def test_the_manifest_equals_a_recount_from_the_images(networks, one_go):
    manifest = pd.read_csv(one_go / MANIFEST)
    assert len(manifest) == 64
    assert manifest["prompt"].value_counts().to_dict() == dict.fromkeys(PROMPTS, 2)
    images = torch.stack(
        [
            torch.from_numpy(np.array(Image.open(one_go / INPUT / f"{name}.png")))
            for name in manifest["id"]
        ]
    ).permute(0, 3, 1, 2)
    images = images.float() / 255
    conditions = torch.from_numpy(manifest[list(ATTRIBUTES)].to_numpy(np.float32))
    assert torch.equal(conditions, CONDITIONS.repeat(2, 1))
    judge = load_classifier(networks["judge"])(images).sigmoid()
    reward = load_classifier(networks["reward"])(images).sigmoid()
    judged = manifest[[f"judge_{a}" for a in ARTIFACTS]].to_numpy()
    read = manifest[[f"reward_{a}" for a in ATTRIBUTES]].to_numpy()
    np.testing.assert_allclose(judged, judge, atol=1e-5)
    np.testing.assert_allclose(read, reward, atol=1e-5)
    hits = (read > 0.5) == conditions.bool().numpy()
    np.testing.assert_allclose(manifest["reward"], hits.mean(axis=1), atol=1e-6)
    assert manifest["seed"].eq(0).all()
    assert manifest["noise_key"].tolist() == [key(0, "test", 0, i) for i in range(64)]


def test_an_image_can_be_drawn_again_from_its_row(networks, one_go, tmp_path):
    row = pd.read_csv(one_go / MANIFEST).iloc[37]
    module = module_of(networks)
    module.trainer = quiet_trainer(tmp_path)
    module.configure_model()
    image = module.generate([row["prompt"]], torch.tensor([row["noise_key"]]))[0]
    saved = np.asarray(Image.open(one_go / INPUT / f"{row['id']}.png"), dtype=np.float32)
    # alone it is rounded differently from in its batch, so by one step of 255 at most
    assert np.abs(image.permute(1, 2, 0).numpy() * 255 - saved).max() < 0.51


def test_the_isic_reader_reads_the_folder_with_the_prompts_as_labels(one_go):
    data = ISICDataModule(str(one_go), size=16, num_workers=0, batch_size=64, split="lesion")
    manifest = pd.read_csv(one_go / MANIFEST).set_index("id")
    seen = {}
    for split in ("train", "val", "test"):
        images = data.dataset(split)
        for item in (images[i] for i in range(len(images))):
            row = manifest.loc[item["id"]]
            assert item["prompt"] == row["prompt"]
            assert item["condition"].tolist() == row[list(ATTRIBUTES)].tolist()
            seen[item["id"]] = item["image"]
    assert seen.keys() == set(manifest.index)
    saved = np.asarray(Image.open(one_go / INPUT / f"{manifest.index[5]}.png"))
    assert torch.equal(
        seen[manifest.index[5]], torch.from_numpy(saved / np.float32(255)).permute(2, 0, 1)
    )
    assert data.describe().startswith("64 melanomas and nevi, split: ")


def test_ids_tell_prompt_and_index():
    ids = [sample_id(short_name(c), index) for c in CONDITIONS for index in (0, 959, 2_000_000)]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[A-Za-z0-9_]+", name) for name in ids)
    name = short_name(condition_of("NV", ("hair", "gel_bubble")))
    assert sample_id(name, 37) == "NV_hair_gel_bubble_000037"


def test_the_command_keeps_no_prediction_in_memory(networks, tmp_path):
    cli = main(command(tmp_path, networks, "--data.prompts", f"[{PROMPTS[0]}]"))
    assert cli.trainer.predict_loop.predictions == []
    assert len(times(tmp_path / "samples")) == 2


def test_a_cpu_computes_on_one_thread_and_gets_the_others_back(networks, tmp_path):
    before, used = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        module = module_of(networks, steps=1)
        note = lambda *_: used.append(torch.get_num_threads())  # noqa: E731
        progress.subscribe(note)
        data = ISICPromptDataModule(test_samples_per_prompt=1)
        folder = SampleFolder(str(tmp_path / "samples"))
        quiet_trainer(tmp_path, folder).predict(module, data, return_predictions=False)
        progress.unsubscribe(note)
        assert set(used) == {1}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
