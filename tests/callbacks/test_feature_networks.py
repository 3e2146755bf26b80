import socket
import threading
import time

import pytest
import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from rl4med_ddpo.callbacks import feature_networks
from rl4med_ddpo.callbacks.feature_networks import (
    ALEXNET,
    INCEPTION,
    Unavailable,
    Weights,
    classifier_features,
    inception_features,
    lpips_network,
    untrained_lpips,
)
from rl4med_ddpo.foundation.errors import UserError
from rl4med_ddpo.foundation.hashes import weights_digest
from rl4med_ddpo.lightning_modules.classifier import load_classifier


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


def trunk_file(path):
    """A random trunk under the names of torchvision's AlexNet, and the LPIPS that it makes."""
    torch.manual_seed(0)
    network = untrained_lpips()
    state = {f"features.{k.partition('.')[2]}": v for k, v in network.net.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)
    return network


@pytest.mark.parametrize("given", [True, False])
def test_lpips_equals_the_packages_with_the_same_trunk(empty_cache, tmp_path, given):
    path = tmp_path / "mine.pth" if given else empty_cache / "alexnet-owt-7be5be79.pth"
    package = trunk_file(path)
    ours = lpips_network(str(path) if given else None)
    one, other = torch.rand(2, 4, 3, 64, 64)
    expected = package(one * 2 - 1, other * 2 - 1).flatten()
    assert torch.equal(ours(one, other, normalize=True).flatten(), expected)
    assert (expected > 0).all()
    assert ours(one, one, normalize=True).abs().max() == 0


@pytest.mark.parametrize("weights", [INCEPTION, ALEXNET])
@pytest.mark.parametrize("offline", ["1", "0"])
def test_weights_that_are_not_to_be_had_say_what_would_help(
    empty_cache, monkeypatch, weights, offline
):
    def refuse(url, *_, **options):
        raise OSError("no route")

    monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [])
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with pytest.raises(Unavailable) as why:
        weights.find(None)
    file = str(empty_cache / weights.url.rpartition("/")[2])
    for part in (weights.url, file, "TORCH_HOME", weights.option):
        assert part in str(why.value)
    assert ("HF_HUB_OFFLINE" if offline == "1" else "no route") in str(why.value)


def test_a_server_that_does_not_answer_costs_less_than_five_seconds(empty_cache, monkeypatch):
    assert feature_networks.TIMEOUT < 5
    monkeypatch.setattr(feature_networks, "TIMEOUT", 0.5)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/weights-01234567.pth"
        start = time.monotonic()
        with pytest.raises(Unavailable, match="timed out"):
            Weights("weights", url, "an option").find(None)
        assert 0.4 < time.monotonic() - start < 2


def test_a_name_server_that_does_not_answer_costs_less_than_five_seconds(empty_cache, monkeypatch):
    """Resolving has no time limit, and a network behind a dead gateway never resolves."""
    answered = threading.Event()
    monkeypatch.setattr(feature_networks, "TIMEOUT", 0.5)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answered.wait(60))
    start = time.monotonic()
    with pytest.raises(Unavailable, match="no answer within"):
        INCEPTION.find(None)
    answered.set()
    assert 0.4 < time.monotonic() - start < 2


@pytest.mark.parametrize("load", [inception_features, lpips_network])
def test_a_file_with_more_than_tensors_is_not_opened(tmp_path, load):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "canary"), "w"))

    file = tmp_path / "weights.pth"
    torch.save({"bomb": Bomb()}, file)
    with pytest.raises(UserError, match=f"{file}.*more than tensors.*open") as error:
        load(str(file))
    assert "safetensors" in str(error.value)
    assert not (tmp_path / "canary").exists()


def test_torch_fidelity_still_has_the_file_where_we_look():
    """Its own loader unpickles anything; when it stops, ours need not look first."""
    assert INCEPTION.url.endswith("weights-inception-2015-12-05-6726825d.pth")
    assert FeatureExtractorInceptionV3.get_provided_features_list()[3] == "2048"


def test_classifier_features_are_what_the_last_layer_sees(tiny_classifiers):
    classifier = load_classifier(tiny_classifiers["judge"])
    images = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    look = classifier_features(classifier)
    last = classifier.network.get_classifier()
    logits = classifier(images.float() / 255)
    torch.testing.assert_close(last(look(images)), logits)
    assert look.described["resize"].endswith("32 x 32")


def test_a_hash_is_of_the_weights_and_not_of_the_file(tiny_classifiers):
    judge = load_classifier(tiny_classifiers["judge"])
    assert weights_digest(judge) == weights_digest(load_classifier(tiny_classifiers["judge"]))
    before = weights_digest(judge)
    next(judge.network.parameters()).data.view(-1)[0] += 1e-6
    assert weights_digest(judge) != before
