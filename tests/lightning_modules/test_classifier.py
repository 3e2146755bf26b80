import math
import time
from functools import partial

import huggingface_hub.constants
import lightning as L
import pytest
import timm
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import save_file
from torch import nn

from rl4med_ddpo.foundation.errors import UserError
from rl4med_ddpo.lightning_modules.classifier import AttributeClassifier, load_classifier
from rl4med_ddpo.lightning_modules.networks.backbone import build_backbone
from support.attribute_images import AttributeImageData
from support.dermoscopy import ARTIFACTS, ATTRIBUTES
from support.tiny import fitted
from support.trainers import quiet_trainer

TINY = {"backbone": "test_efficientnet", "pretrained": False, "image_size": 48}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    L.seed_everything(0)
    path = tmp_path_factory.mktemp("classifier")
    module = AttributeClassifier(
        **TINY, warmup=0.3, dropout=0.0, optimizer=partial(torch.optim.AdamW, lr=3e-3)
    )
    best = ModelCheckpoint(path, monitor="val/loss")
    trainer = quiet_trainer(path, max_epochs=5, enable_checkpointing=True, callbacks=[best])
    trainer.fit(module, AttributeImageData())
    trainer.save_checkpoint(path / "end.ckpt")
    return trainer, module, path / "end.ckpt"


def test_learns_what_is_visible(trained):
    trainer, _, path = trained
    assert trainer.callback_metrics["val/exact_match"] > 0.95
    classifier = load_classifier(path, heads="all")
    data = AttributeImageData().sets["val"]
    # a larger picture of the same cells is read alike: forward resizes by itself
    images = data.images.repeat_interleave(2, 2).repeat_interleave(2, 3)
    present = classifier(images).sigmoid() > 0.5
    assert (present == data.conditions.bool()).all(dim=1).float().mean() > 0.9


def test_logged_scores_agree_with_a_recount(trained):
    trainer, module, _ = trained
    data = AttributeImageData().sets["val"]
    module.eval()
    with torch.no_grad():
        logits = module(data.images)
    loss = sum(
        math.log1p(math.exp(-(2 * y - 1) * x))
        for x, y in zip(logits.flatten().tolist(), data.conditions.flatten().tolist(), strict=True)
    )
    assert trainer.callback_metrics["val/loss"].item() == pytest.approx(
        loss / logits.numel(), rel=1e-4
    )
    right = [
        all((x > 0) == (y > 0.5) for x, y in zip(row, truth, strict=True))
        for row, truth in zip(logits.tolist(), data.conditions.tolist(), strict=True)
    ]
    assert trainer.callback_metrics["val/exact_match"].item() == pytest.approx(
        sum(right) / len(right)
    )


def test_test_reports_the_same_scores_under_its_own_name(trained, tmp_path):
    trainer, _, path = trained
    scores = quiet_trainer(tmp_path).test(
        AttributeClassifier(**TINY), AttributeImageData(), ckpt_path=path, verbose=False
    )[0]
    for name, value in scores.items():
        expected = trainer.callback_metrics[name.replace("test/", "val/")]
        assert value == pytest.approx(expected.item(), rel=1e-5)
    assert len([n for n in scores if n.startswith("test/f1/")]) == 7


def test_learning_rate_rises_and_falls_to_the_minimum(tmp_path):
    rates = []

    class Rates(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            rates.append(trainer.callback_metrics["train/lr"].item())

    module = AttributeClassifier(**TINY, warmup=0.25, optimizer=partial(torch.optim.AdamW, lr=1e-2))
    quiet_trainer(tmp_path, max_epochs=1, callbacks=[Rates()], limit_val_batches=0).fit(
        module, AttributeImageData(train=256, batch_size=8)
    )
    rise, steps = 8, 32
    expected = [1e-2 * (1 / 25 + 24 / 25 * i / rise) for i in range(rise)] + [
        1e-6 + (1e-2 - 1e-6) * (1 + math.cos(math.pi * i / (steps - rise))) / 2
        for i in range(steps - rise)
    ]
    assert rates == pytest.approx(expected, rel=1e-4)


def test_resumed_fit_equals_an_uninterrupted_one(tmp_path):
    class Ordered(AttributeImageData):
        def train_dataloader(self):
            return torch.utils.data.DataLoader(self.sets["train"], self.batch_size)

    def run(ckpt_path=None):
        L.seed_everything(1)
        module = AttributeClassifier(**TINY, dropout=0.0, pos_weight="balanced")
        every_epoch = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        trainer = quiet_trainer(
            tmp_path, max_epochs=2, enable_checkpointing=True, callbacks=[every_epoch]
        )
        trainer.fit(module, Ordered(train=96, val=32), ckpt_path=ckpt_path)
        return module.state_dict()

    whole = run()
    resumed = run(tmp_path / "epoch=0.ckpt")
    assert whole.keys() == resumed.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(resumed[name], tensor, rtol=0, atol=0)


def test_judge_has_the_four_artifact_heads_and_their_targets():
    judge = AttributeClassifier(**TINY, attributes=ARTIFACTS)
    judge.configure_model()
    condition = torch.tensor([[1.0, 0, 1, 0, 0, 1]])
    assert judge(torch.rand(1, 3, 20, 30)).shape == (1, 4)
    assert judge.targets({"condition": condition}).tolist() == [[1, 0, 1, 0]]


def test_the_network_is_built_on_the_cpu_whatever_the_default_device():
    module = AttributeClassifier(**TINY)
    with torch.device("meta"):
        module.configure_model()
    assert {t.device.type for t in (*module.parameters(), module.mean, module.std)} == {"cpu"}


def test_normalises_with_the_means_of_the_backbone():
    module = AttributeClassifier(**TINY).eval()
    module.configure_model()
    seen = []
    module.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    module(torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1).expand(1, 3, 48, 48))
    module(torch.ones(1, 3, 96, 96))
    assert seen[0].abs().max() < 1e-6
    assert seen[1][0, :, 0, 0].tolist() == pytest.approx([2.2489, 2.4286, 2.64], abs=1e-3)


def test_loaded_classifier_is_ready_to_score(trained):
    classifier = load_classifier(trained[2])
    assert not any(m.training for m in classifier.modules())
    assert not any(p.requires_grad for p in classifier.parameters())
    assert {p.dtype for p in classifier.parameters()} == {torch.float32}
    assert classifier.attributes == ATTRIBUTES


def test_loading_a_classifier_trained_from_pretrained_weights_fetches_nothing(
    trained, tmp_path, monkeypatch
):
    checkpoint = torch.load(trained[2], weights_only=True)
    checkpoint["hyper_parameters"]["pretrained"] = True
    torch.save(checkpoint, tmp_path / "pretrained.ckpt")
    monkeypatch.setattr(
        "rl4med_ddpo.lightning_modules.networks.backbone._pretrained_file", pytest.fail
    )
    assert load_classifier(tmp_path / "pretrained.ckpt").pretrained is False


def test_balanced_weights_are_negatives_over_positives(tmp_path):
    module = AttributeClassifier(**TINY, pos_weight="balanced")
    data = AttributeImageData(train=64, val=32)
    quiet_trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(module, data)
    positives = [
        sum(column) for column in zip(*data.sets["train"].conditions.tolist(), strict=True)
    ]
    assert module.positive_weight.tolist() == pytest.approx([(64 - p) / p for p in positives])
    # positives weigh as much as negatives: at logit 0 both cost ln 2 in all
    assert module.positive_weight.tolist() != [1.0] * 6


def test_weights_by_name_enter_the_loss():
    weights = dict.fromkeys(ATTRIBUTES, 1.0) | {"ink": 7.0}
    module = AttributeClassifier(**TINY, pos_weight=weights)
    loss = module._losses(torch.zeros(1, 6), torch.ones(1, 6)).mean()
    assert loss.item() == pytest.approx(math.log(2) * (5 + 7) / 6)


def test_balanced_weights_without_a_single_ink_image(tmp_path):
    data = AttributeImageData(train=8, val=8)
    data.sets["train"].conditions = torch.eye(6)[[0, 1, 2, 4, 4, 5, 5, 5]]
    with pytest.raises(UserError, match="ink 0"):
        quiet_trainer(tmp_path, max_steps=1, num_sanity_val_steps=0).fit(
            AttributeClassifier(**TINY, pos_weight="balanced"), data
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attributes": ("ink", "hair")}, "in this order"),
        ({"attributes": ("hair", "freckles")}, "freckles"),
        ({"attributes": ()}, "none"),
        ({"backbone": "efficientnet_b00"}, "efficientnet_b0"),
        ({"pos_weight": {"ink": 2.0}}, "hair, gel_bubble"),
        ({"warmup": 1.0}, "warmup"),
    ],
)
def test_impossible_settings_are_refused_at_construction(options, message):
    with pytest.raises(UserError, match=message):
        AttributeClassifier(**TINY | options)


def test_a_network_of_a_fixed_input_size_is_built_for_the_images():
    module = AttributeClassifier(**TINY | {"backbone": "test_vit", "image_size": 64})
    module.configure_model()
    assert module(torch.rand(2, 3, 16, 16)).shape == (2, 6)
    with pytest.raises(UserError, match="'test_vit' does not read images of 100 x 100"):
        AttributeClassifier(**TINY | {"backbone": "test_vit", "image_size": 100})
    with pytest.raises(UserError, match="set image_size: 240, or take a network for any size"):
        AttributeClassifier(**TINY | {"backbone": "crossvit_9_240", "image_size": 96})


@pytest.mark.parametrize("size", [31, 1])
def test_a_batch_of_a_single_image_is_normalised_by_the_running_means(tmp_path, size):
    data = AttributeImageData(train=63, val=8, batch_size=size)
    module = AttributeClassifier(**TINY | {"image_size": 32})
    seen = []
    forward = module.forward

    def recorded(images):
        norm = next(m for m in module.network.modules() if isinstance(m, nn.BatchNorm2d))
        seen.append((len(images), module.training, norm.training))
        return forward(images)

    module.forward = recorded
    trainer = quiet_trainer(tmp_path, max_epochs=1, limit_val_batches=1)
    trainer.fit(module, datamodule=data)
    assert trainer.callback_metrics["train/loss"].isfinite()
    trained = {(n, by_batch) for n, training, by_batch in seen if training}
    assert trained == ({(31, True), (1, False)} if size == 31 else {(1, False)})
    assert all(m.training for m in module.network.modules() if isinstance(m, nn.BatchNorm2d))


def test_a_run_without_an_end_has_no_schedule(tmp_path):
    with pytest.raises(UserError, match=r"trainer\.max_epochs"):
        quiet_trainer(tmp_path, max_epochs=-1).fit(
            AttributeClassifier(**TINY), AttributeImageData()
        )


def test_construction_is_instant_and_builds_nothing():
    start = time.perf_counter()
    module = AttributeClassifier()
    assert time.perf_counter() - start < 1
    assert not list(module.parameters())


def test_missing_pretrained_weights_say_what_to_fetch(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    start = time.perf_counter()
    with pytest.raises(UserError, match=r"hf download timm/efficientnet_b0\.ra_in1k") as error:
        AttributeClassifier().configure_model()
    assert "pretrained: false" in str(error.value)
    assert time.perf_counter() - start < 10


def test_pretrained_weights_come_from_the_hub_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    weights = timm.create_model("test_efficientnet").state_dict()
    commit = "0" * 40
    repo = tmp_path / "models--timm--test_efficientnet.r160_in1k"
    (repo / "snapshots" / commit).mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    save_file(weights, repo / "snapshots" / commit / "model.safetensors")
    network = build_backbone(
        "test_efficientnet", pretrained=True, outputs=6, dropout=0.3, image_size=32
    )
    assert network.classifier.out_features == 6
    for name, tensor in network.state_dict().items():
        if not name.startswith("classifier"):
            torch.testing.assert_close(tensor, weights[name], rtol=0, atol=0)


def test_missing_file_names_the_command_that_makes_it(tmp_path):
    with pytest.raises(UserError, match=r"rl4med-ddpo fit --config classifier\.yaml"):
        load_classifier(tmp_path / "none.ckpt")


def test_damaged_file_is_refused(trained, tmp_path):
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes(trained[2].read_bytes()[:5000])
    text = tmp_path / "text.ckpt"
    text.write_text("version https://git-lfs.github.com/spec/v1")
    for path in (cut, text):
        with pytest.raises(UserError, match="cannot be read"):
            load_classifier(path)


def test_another_modules_checkpoint_is_refused(tmp_path):
    torch.save({"state_dict": {}, "hyper_parameters": {"pipeline": "x"}}, tmp_path / "sd.ckpt")
    torch.save(torch.zeros(3), tmp_path / "tensor.ckpt")
    for name in ("sd.ckpt", "tensor.ckpt"):
        with pytest.raises(UserError, match="not of an AttributeClassifier"):
            load_classifier(tmp_path / name)


def test_missing_weights_are_refused(trained, tmp_path):
    checkpoint = torch.load(trained[2], weights_only=True)
    del checkpoint["state_dict"]["network.classifier.weight"]
    torch.save(checkpoint, tmp_path / "holes.ckpt")
    with pytest.raises(UserError, match=r"network\.classifier\.weight"):
        load_classifier(tmp_path / "holes.ckpt")


def test_wrong_heads_are_refused_with_both_lists(trained, tiny_classifiers, tmp_path):
    load_classifier(trained[2], heads="judge")
    with pytest.raises(UserError, match="other heads") as error:
        load_classifier(tiny_classifiers["judge"], heads="all")
    assert f"needed (6): {', '.join(ATTRIBUTES)}" in str(error.value)
    assert f"found  (4): {', '.join(ARTIFACTS)}\n" in str(error.value)
    some = fitted(tmp_path / "some.ckpt", "test_efficientnet", ("hair", "ink"), seed=0)
    with pytest.raises(UserError, match="other heads") as error:
        load_classifier(some, heads="judge")
    for allowed in (ATTRIBUTES, ARTIFACTS):
        assert f"needed ({len(allowed)}): {', '.join(allowed)}\n" in str(error.value)


def test_pretrained_weights_come_from_a_file(tmp_path):
    weights = timm.create_model("test_efficientnet").state_dict()
    save_file(weights, tmp_path / "weights.safetensors")
    module = AttributeClassifier(**TINY | {"pretrained": str(tmp_path / "weights.safetensors")})
    module.configure_model()
    for name, tensor in module.network.state_dict().items():
        if not name.startswith("classifier"):
            assert torch.equal(tensor, weights[name]), name
    del weights["conv_stem.weight"]
    save_file(weights, tmp_path / "holes.safetensors")
    (tmp_path / "text.safetensors").write_text("<html>")
    for file, backbone, says in [
        ("holes", "test_efficientnet", "1 tensors are missing.*conv_stem.weight"),
        ("weights", "test_resnet", "not those of the backbone 'test_resnet'"),
        ("text", "test_efficientnet", "cannot read the pretrained weights"),
        ("gone", "test_efficientnet", "cannot read the pretrained weights"),
    ]:
        with pytest.raises(UserError, match=says):
            build_backbone(backbone, str(tmp_path / f"{file}.safetensors"), 6, 0.3, 32)
