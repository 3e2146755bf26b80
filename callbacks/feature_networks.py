"""Feature extractors for evaluation: the judge's features, Inception, LPIPS's AlexNet."""

import os
import socket
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import lpips
import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import (
    URL_INCEPTION_V3,
    FeatureExtractorInceptionV3,
)
from torchvision.models import AlexNet_Weights

from rl4med_ddpo.foundation.checkpoints import read_checkpoint
from rl4med_ddpo.foundation.errors import UserError
from rl4med_ddpo.foundation.hashes import weights_digest
from rl4med_ddpo.lightning_modules.classifier import AttributeClassifier
from rl4med_ddpo.lightning_modules.pipelines.hub import run_with_timeout

TIMEOUT = 4.0


@dataclass(frozen=True)
class Weights:
    """Published weights, looked for in a given file, then in torch's cache, then on their server.

    Attributes:
        title: What they are, for messages.
        url: Their address; the file's name ends in the first digits of its sha256.
        option: Name of the option that gives the file.
    """

    title: str
    url: str
    option: str

    @property
    def cached(self) -> Path:
        """Where torch, torchvision, torchmetrics and torch-fidelity keep the file."""
        return Path(torch.hub.get_dir()) / "checkpoints" / self.url.rpartition("/")[2]

    def find(self, given: str | None) -> Path:
        """Return the file.

        Raises:
            Unavailable: if it is nowhere to be had, with what to fetch and where to put it.
            UserError: if the given file does not exist.
        """
        if given is not None:
            if not Path(given).is_file():
                raise UserError(f"there is no file {given}, given as {self.option}; {self.remedy}")
            return Path(given)
        if self.cached.is_file():
            return self.cached
        if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
            raise Unavailable(f"no {self.title} here, and HF_HUB_OFFLINE is set: {self.remedy}")
        try:
            self.cached.parent.mkdir(parents=True, exist_ok=True)
            # resolving a name knows no time limit of its own
            run_with_timeout(TIMEOUT, lambda: socket.getaddrinfo(urlsplit(self.url).hostname, None))
            with _patience(TIMEOUT):
                digits = self.cached.stem.rpartition("-")[2]
                torch.hub.download_url_to_file(self.url, str(self.cached), digits, progress=False)
        except (OSError, RuntimeError) as error:
            cause = f"no {self.title} here, and it could not be fetched ({error})"
            raise Unavailable(f"{cause}: {self.remedy}") from error
        return self.cached

    @property
    def remedy(self) -> str:
        """What to do."""
        place = str(self.cached).replace(str(Path.home()), "~", 1)
        return (
            f"fetch {self.url} and put it at {place} (TORCH_HOME moves that folder), or give "
            f"its path as {self.option}"
        )


INCEPTION = Weights("Inception weights for FID and KID", URL_INCEPTION_V3, "Evaluation's inception")
ALEXNET = Weights(
    "AlexNet weights for LPIPS", AlexNet_Weights.IMAGENET1K_V1.url, "Evaluation's alexnet"
)


class Unavailable(Exception):
    """A metric cannot be had on this machine: the message says why and what would help."""


class FeatureNetwork(nn.Module):
    """A network that turns images `(B, 3, S, S)` uint8 into features `(B, D)` float32.

    Args:
        network: The network.
        features: How it is called.
        described: What a result says of it: name, resize, and where its weights come from.
    """

    def __init__(
        self, network: nn.Module, features: Callable[[Tensor], Tensor], described: dict[str, Any]
    ) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.features = features
        self.described = {**described, "digest": weights_digest(network)}

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Compute the features in float32, whatever the trainer's precision."""
        with torch.autocast(images.device.type, enabled=False):
            return self.features(images).float()


def classifier_features(classifier: AttributeClassifier) -> FeatureNetwork:
    """Look through a classifier: what its last layer sees, after pooling."""
    size = classifier.image_size
    resize = f"bilinear, antialiased, to {size} x {size}"
    described = {"network": classifier.backbone, "resize": resize}
    return FeatureNetwork(classifier, lambda x: classifier.features(x.float() / 255), described)


def inception_features(given: str | None = None) -> FeatureNetwork:
    """Load the Inception of the published FIDs, in torch-fidelity's port, 2,048 features.

    Args:
        given: File of weights; else torch's cache, else their server.

    Raises:
        Unavailable: if the weights are not available.
    """
    path = INCEPTION.find(given)
    # torch-fidelity itself would unpickle anything
    read_checkpoint(path)
    network = FeatureExtractorInceptionV3("inception", ["2048"], str(path))
    described = {
        "network": "Inception-v3 (2015-12-05), torch-fidelity's port",
        "resize": "bilinear as in TensorFlow 1, not antialiased, to 299 x 299",
        "file": str(path),
    }
    return FeatureNetwork(network, lambda images: network(images)[0], described)


def lpips_network(given: str | None = None) -> lpips.LPIPS:
    """Load LPIPS on AlexNet: the linear layers come with the package, the trunk does not.

    Args:
        given: File of torchvision's AlexNet; else torch's cache, else its server.

    Raises:
        Unavailable: if the trunk's weights are not available.
    """
    path = ALEXNET.find(given)
    state = read_checkpoint(path)
    network = untrained_lpips()
    for name, weight in network.net.named_parameters():
        # lpips calls the layers slice1.0, slice2.3, ...; torchvision features.0, features.3, ...
        weight.data.copy_(state[f"features.{name.partition('.')[2]}"])
    return network.eval().requires_grad_(False)


def untrained_lpips() -> lpips.LPIPS:
    """Build LPIPS on AlexNet with a random trunk."""
    with warnings.catch_warnings():
        # lpips calls torchvision in the manner of old versions
        warnings.filterwarnings("ignore", category=UserWarning, module="torchvision")
        return lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)


@contextmanager
def _patience(seconds: float) -> Iterator[None]:
    """Give a server this long to answer: the library that downloads would wait for good."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
