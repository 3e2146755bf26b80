import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file

from rl4med_ddpo.callbacks import Export
from rl4med_ddpo.datamodules.vocabulary import DERMOSCOPY
from rl4med_ddpo.report.model_card import model_card
from support.tiny import prompts, tiny_ddpo
from support.trainers import quiet_trainer

RESULTS = {
    "kind": "samples",
    "apr": 0.6314, "apr_interval": [0.61, 0.6512], "correct": 1293, "n": 2048,
    "reward": 0.91,
    "prompts": {"MEL": {"apr": 0.123456}},
    "distribution": {"inception": {"fid": {"value": 114.7, "interval": [110.0, 119.0], "n": 2493}}},
    "provenance": {"seed": 987654},
    "unavailable": {"kid": "no weights on this machine"},
}  # fmt: skip


def parts(card):
    _, head, body = card.split("---\n", 2)
    return yaml.safe_load(head), body


def test_the_card_tells_data_licence_scores_and_limits(tiny_pipeline, tiny_classifiers):
    module = tiny_ddpo(tiny_pipeline, tiny_classifiers)
    head, body = parts(model_card(module, DERMOSCOPY, RESULTS))
    assert head["license"] == "cc-by-nc-4.0"
    assert head["base_model"] == tiny_pipeline
    assert head["library_name"] == "diffusers"
    for told in (
        "ISIC 2019", "CC-BY-NC-4.0", "not for diagnosis", "32 of them", "load_lora_weights",
        "| apr | 0.6314 (95% interval 0.61 to 0.6512) |", "| n | 2,048 |", "| reward | 0.91 |",
        "| distribution inception fid | 114.7 (95% interval 110 to 119), n = 2,493 |",
        "kid: not measured, no weights on this machine", "`lora_rank`".strip("`"),
    ):  # fmt: skip
        assert told in body
    assert "0.1235" not in body
    assert "987654" not in body
    assert "None yet" in parts(model_card(module, DERMOSCOPY, None))[1]


def test_training_leaves_the_card_and_test_adds_the_scores(
    tiny_pipeline, tiny_classifiers, tmp_path
):
    policy = tmp_path / "policy"

    def trainer():
        return quiet_trainer(tmp_path, max_epochs=1, callbacks=[Export(str(policy), "last")])

    module = tiny_ddpo(tiny_pipeline, tiny_classifiers, policy=str(policy))
    trainer().fit(module, prompts())
    card = (policy / "README.md").read_text()
    assert "None yet" in card
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "metrics.json").write_text('{"apr": 0.25, "n": 8}')
    Export(str(policy)).on_test_end(trainer(), module)
    assert "| apr | 0.25 |" in (policy / "README.md").read_text()
    # the scores of one folder do not make a card in another
    Export(str(tmp_path / "other")).on_test_end(trainer(), module)
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
