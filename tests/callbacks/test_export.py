import json
from dataclasses import replace

import pandas as pd
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file

from rl4med_ddpo.callbacks import Export
from rl4med_ddpo.datamodules.annotations import METADATA
from rl4med_ddpo.datamodules.dermoscopy import DermoscopyFolder
from rl4med_ddpo.datamodules.isic import ISICDataModule
from rl4med_ddpo.datamodules.provenance import ORIGIN, Origin, origin_of
from rl4med_ddpo.datamodules.vocabulary import DERMOSCOPY
from rl4med_ddpo.foundation.hashes import weights_digest
from rl4med_ddpo.report.model_card import model_card, with_scores
from support.fine_tuning import module as fine_tuned
from support.tiny import prompts, tiny_ddpo
from support.trainers import quiet_trainer

RESULTS = {
    "kind": "samples",
    "apr": 0.6314, "apr_interval": [0.61, 0.6512], "correct": 1293, "n": 2048,
    "reward": 0.91,
    "prompts": {"MEL": {"apr": 0.123456}},
    "distribution": {"inception": {
        "fid": {"value": 114.7, "interval": [110.0, 119.0], "n": 2493},
        "noise_floor": {"value": 2.05, "range": [0.57, 3.24], "halvings": 5, "n": 375},
    }},
    "provenance": {"seed": 987654, "sampler": {"steps": 8, "guidance": 1.5, "eta": 1.0}},
    "unavailable": {"kid": "no weights on this machine"},
}  # fmt: skip


def parts(card):
    _, head, body = card.split("---\n", 2)
    return yaml.safe_load(head), body


def test_the_card_tells_data_licence_scores_and_limits(tiny_pipeline, tiny_classifiers):
    module = tiny_ddpo(tiny_pipeline, tiny_classifiers)
    card = model_card(module, DERMOSCOPY, Origin("some images", "CC-BY-4.0"), "owner/name")
    assert "None yet" in card
    head, body = parts(with_scores(card, RESULTS))
    assert "None yet" not in body
    assert (head["license"], head["base_model"]) == ("cc-by-4.0", "owner/name")
    assert head["library_name"] == "diffusers"
    for told in (
        "some images", "CC-BY-4.0", "not for diagnosis", "32 of them", "load_lora_weights",
        ", num_inference_steps=4, guidance_scale=3.0, eta=1.0).images[0]",
        "drawn with steps 8, guidance 1.5, eta 1.0:",
        "| apr | 0.6314 (95% interval 0.61 to 0.6512) |", "| n | 2,048 |", "| reward | 0.91 |",
        "| distribution inception fid | 114.7 (95% interval 110 to 119), n = 2,493 |",
        "noise_floor | 2.05 (least to greatest of 5 halvings: 0.57 to 3.24), n = 375 |",
        "kid: not measured, no weights on this machine", "`lora_rank`".strip("`"),
    ):  # fmt: skip
        assert told in body
    assert "0.1235" not in body
    assert "987654" not in body
    unknown, body = parts(model_card(module, DERMOSCOPY, Origin(), None))
    assert not {"license", "base_model", "training_data"} & unknown.keys()
    assert "**Data:** not stated" in body
    assert "ISIC" not in body


def exported(module, data, folder):
    trainer = quiet_trainer(folder, max_epochs=1, callbacks=[Export(str(folder), "last")])
    trainer.fit(module, data)
    return (folder / "README.md").read_text()


def test_each_card_tells_the_data_of_its_own_run(tiny_pipeline, tiny_classifiers, tmp_path):
    drawn = tmp_path / "drawn"
    DermoscopyFolder(drawn, images=40, size=16).write()
    data = ISICDataModule(str(drawn), size=16, batch_size=16, num_workers=0)
    tuned, policy = tmp_path / "tuned", tmp_path / "policy"
    first = parts(exported(fine_tuned(tiny_pipeline), data, tuned))
    second = parts(exported(tiny_ddpo(str(tuned), tiny_classifiers), prompts(), policy))
    for head, body in (first, second):
        assert head["training_data"] == "40 drawn images of skin lesions (seed 0), no photographs"
        assert head["license"] == "mit"
        assert "base_model" not in head
        assert "ISIC" not in body
        assert "CC-BY" not in body
    assert f"**Starts from:** `{tuned}`" in second[1]


@pytest.mark.parametrize(
    ("lesions", "vocabulary", "found"),
    [
        (["HAM_0000001", "BCN_0000002", "MSK4_0000003", ""], DERMOSCOPY, "ISIC 2019"),
        (["HAM_0000001", "CLINIC_0000002"], DERMOSCOPY, ""),
        (["", ""], DERMOSCOPY, ""),
        (["CLINIC_0000002"], replace(DERMOSCOPY, data="ours", licence="none"), "ours"),
    ],
)
def test_data_are_called_isic_only_if_their_tables_say_so(lesions, vocabulary, found, tmp_path):
    DermoscopyFolder(tmp_path, images=40, size=16).write()
    (tmp_path / ORIGIN).unlink()
    table = pd.read_csv(tmp_path / METADATA)
    table["lesion_id"] = [lesions[i % len(lesions)] for i in range(len(table))]
    table.to_csv(tmp_path / METADATA, index=False)
    origin = origin_of(ISICDataModule(str(tmp_path), vocabulary=vocabulary))
    assert origin.data.startswith(found)
    assert bool(origin.data) == bool(origin.licence) == bool(found)


def test_scores_reach_the_card_of_what_was_scored_alone(tiny_pipeline, tiny_classifiers, tmp_path):
    policy = tmp_path / "policy"
    module = tiny_ddpo(tiny_pipeline, tiny_classifiers, policy=str(policy))
    before = exported(module, prompts(), policy)
    results = tmp_path / "results" / "metrics.json"
    results.parent.mkdir()
    trainer, export = quiet_trainer(tmp_path), Export(str(policy))

    def told(digest, trained_from):
        sampler = {"digest of unet": digest, "steps": 8}
        results.write_text(json.dumps({"apr": 0.25, "provenance": {"sampler": sampler}}))
        module.trained_from = trained_from
        export.on_test_end(trainer, module)
        return (policy / "README.md").read_text()

    own = weights_digest(module.model.unet)
    for digest, trained_from in (("other", str(policy)), (own, "other.ckpt"), (own, None)):
        assert told(digest, trained_from) == before
    assert "| apr | 0.25 |" in told(own, str(policy))
    # the scores of one folder do not make a card in another
    Export(str(tmp_path / "other")).on_test_end(trainer, module)
    assert not (tmp_path / "other").exists()


def test_the_best_weights_of_before_0_2_are_exported(tiny_pipeline, tiny_classifiers, tmp_path):
    best = ModelCheckpoint(tmp_path, "best", monitor="reward/mean", mode="max")
    folders = [tmp_path / name for name in ("now", "before")]
    export = Export(str(folders[0]))
    trainer = quiet_trainer(
        tmp_path, max_epochs=1, enable_checkpointing=True, callbacks=[best, export]
    )
    module = tiny_ddpo(tiny_pipeline, tiny_classifiers)
    trainer.fit(module, prompts())
    checkpoint = torch.load(best.best_model_path, weights_only=True)
    state = checkpoint["state_dict"]
    checkpoint["state_dict"] = {k.removeprefix("model."): tensor for k, tensor in state.items()}
    torch.save(checkpoint, best.best_model_path)
    export.dirpath = folders[1]
    export.on_fit_end(trainer, module)
    now, before = (load_file(folder / "pytorch_lora_weights.safetensors") for folder in folders)
    assert now.keys() == before.keys()
    assert all(torch.equal(now[name], before[name]) for name in now)
