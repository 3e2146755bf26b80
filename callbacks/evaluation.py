"""Score what `test` drew against the real images, and write `results/metrics.json`."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from numpy.typing import NDArray
from PIL import Image

from rl4med_ddpo.callbacks.extraction import extract
from rl4med_ddpo.callbacks.feature_networks import (
    FeatureNetwork,
    Unavailable,
    classifier_features,
    inception_features,
    lpips_network,
)
from rl4med_ddpo.callbacks.sample_folder import SampleFolder, settings_of
from rl4med_ddpo.datamodules.image_files import ImageFiles, ImagePairs
from rl4med_ddpo.datamodules.isic import ISICDataModule
from rl4med_ddpo.datamodules.provenance import data_counts, data_provenance
from rl4med_ddpo.datamodules.sample_tables import MANIFEST
from rl4med_ddpo.datamodules.vocabulary import Vocabulary
from rl4med_ddpo.foundation.errors import UserError
from rl4med_ddpo.foundation.hashes import has_weights, weights_digest
from rl4med_ddpo.foundation.trainer import Trainer, products_folder
from rl4med_ddpo.lightning_modules.reward_fine_tuning import RewardFineTuning
from rl4med_ddpo.lightning_modules.trained_weights import weights_file
from rl4med_ddpo.metrics.alignment import alignment, prompt_numbers, reader_of_all
from rl4med_ddpo.metrics.copies import thumbnails
from rl4med_ddpo.metrics.distribution import distribution_scores
from rl4med_ddpo.metrics.intervals import cluster_numbers, clustered_mean
from rl4med_ddpo.metrics.leak_matrix import leak_matrix
from rl4med_ddpo.metrics.memorization import memorization
from rl4med_ddpo.metrics.pairs import Pairs, draw_pairs
from rl4med_ddpo.metrics.real_images import real_rates
from rl4med_ddpo.report.figures import leakage_figure
from rl4med_ddpo.report.results import RESULTS, versions, write_csv, write_results
from rl4med_ddpo.report.sheet import Panel, in_rows, save_png, sheet


class Evaluation(Callback):
    """Scores the SampleFolder's images when `test` ends, and compares them with real test images.

    Writes `results/metrics.json` in the run folder, with each number's n, 95% interval, network and
    provenance, and to the same folder the leakage matrix and the nearest training images. Scores
    that need real images are skipped, with a note, when the data module has no root; FID, KID and
    LPIPS when their networks' weights are not available.

    Args:
        inception: File of Inception weights for FID and KID; null takes them from
            torch's cache, else downloads them.
        alexnet: File of AlexNet weights for LPIPS; likewise.
    """

    def __init__(self, inception: str | None = None, alexnet: str | None = None) -> None:
        self.inception = inception
        self.alexnet = alexnet

    def on_test_start(self, trainer: Trainer, pl_module: RewardFineTuning) -> None:
        """Refuse what cannot work before anything is drawn."""
        self.samples = _sample_folder(trainer, self)
        data = trainer.datamodule
        self.vocabulary: Vocabulary = data.vocabulary
        self.data: ISICDataModule | None = data if data.root is not None else None
        if self.data is not None:
            self.data.paths(pd.concat([self.data.splits.train, self.data.splits.test]))
        self.networks, self.unavailable = self._load(pl_module)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: RewardFineTuning) -> None:
        """Score the folder, on all processes together, and write the results on the first."""
        manifest = pd.read_csv(self.samples.root / MANIFEST).sort_values("id", ignore_index=True)
        results = {
            "kind": "samples",
            "model": pl_module.model_name if pl_module.trained_from else "SD",
            **alignment(manifest, self.vocabulary),
            "vocabulary": asdict(self.vocabulary),
            "unavailable": self.unavailable,
            "provenance": self._provenance(trainer, pl_module, manifest),
        }
        for name in ("apr", "reward"):
            pl_module.log(f"test/{name}", results[name], rank_zero_only=True)
        folder = products_folder(trainer) / RESULTS
        if self.data is not None:
            results |= self._beside_real(trainer, pl_module, manifest, folder, self.data)
        if not trainer.is_global_zero:
            return
        matrix = leak_matrix(manifest, self.vocabulary)
        write_csv(folder / "leakage.csv", matrix)
        by_reward = {results["model"]: reader_of_all(manifest, self.vocabulary) == "reward"}
        path = folder / "leakage.png"
        leakage_figure({results["model"]: matrix}, path, self.vocabulary, by_reward)
        path = write_results(products_folder(trainer), results)
        missing = "".join(
            f"\n  not computed: {why}" for why in dict.fromkeys(self.unavailable.values())
        )
        rank_zero_info(f"scores of {len(manifest):,} samples in {path}{missing}")

    def _load(
        self, pl_module: RewardFineTuning
    ) -> tuple[dict[str, FeatureNetwork], dict[str, str]]:
        """Load the networks that there are; say of the others why not."""
        networks, unavailable = {}, {}
        if self.data is None:
            why = "no real images to compare with: give the ISIC folder as --data.root"
            return networks, dict.fromkeys(("fid", "kid", "lpips", "copies", "diversity"), why)
        networks["classifier"] = classifier_features(pl_module.scorer.judge.module)
        try:
            networks["inception"] = inception_features(self.inception)
        except Unavailable as why:
            unavailable |= dict.fromkeys(("fid", "kid"), str(why))
        try:
            self.lpips = lpips_network(self.alexnet)
        except Unavailable as why:
            unavailable["lpips"], self.lpips = str(why), None
        for network in networks.values():
            network.to(pl_module.device)
        return networks, unavailable

    def _beside_real(
        self,
        trainer: Trainer,
        pl_module: RewardFineTuning,
        manifest: pd.DataFrame,
        folder: Path,
        data: ISICDataModule,
    ) -> dict[str, Any]:
        """Compare the samples with real images; every process takes part."""
        sets = self._image_sets(manifest, data)
        extractors = [*self.networks.values(), _thumbnails, _read_by(pl_module.scorer.judge)]
        workers = data.num_workers
        found = {
            name: extract(
                sets[name], extractors if name != "train" else [_thumbnails], trainer, workers
            )
            for name in ("fake", "test", "train")
        }
        fake_prompts = prompt_numbers(manifest, self.vocabulary)
        test, train = (_sorted(rows) for rows in (data.splits.test, data.splits.train))
        lesions = cluster_numbers([*test["lesion_id"], *train["lesion_id"]])
        results: dict[str, Any] = {"features": {}, "distribution": {}}
        pairs = draw_pairs(
            fake_prompts, prompt_numbers(test, self.vocabulary), len(self.vocabulary.keys)
        )
        results["lpips"] = self._perceptual(trainer, sets, pairs, lesions, workers)
        if not trainer.is_global_zero:
            return results
        for i, (name, network) in enumerate(self.networks.items()):
            fake, real = found["fake"][i], found["test"][i]
            results["features"][name] = network.described | {"dimensions": fake.shape[1]}
            results["distribution"][name] = distribution_scores(
                real,
                fake,
                lesions[: len(test)],
                prompt_numbers(test, self.vocabulary),
                fake_prompts,
            )
        looked = len(self.networks)
        results["copies"], nearest = memorization(
            found["fake"][looked], found["test"][looked], found["train"][0], lesions
        )
        results["real"] = real_rates(test, self.vocabulary, found["test"][looked + 1].numpy() > 0)
        results["counts"] = data_counts(data)
        nearest = nearest.assign(id=manifest["id"][nearest["sample"]].to_numpy())
        nearest["nearest"] = train["id"][nearest["train"]].to_numpy()
        write_csv(
            folder / "nearest.csv", nearest[["id", "nearest", "distance", "copy"]], index=False
        )
        panels = [
            Panel([sets["fake"][sample], sets["train"][row]], _nearness(pair, distance, copy))
            for sample, row, *pair, distance, copy in nearest[
                ["sample", "train", "id", "nearest", "distance", "copy"]
            ].to_numpy()
        ]
        drawn = sheet(in_rows(panels, 4), title="sample, and its nearest training image")
        save_png(drawn, folder / "nearest.png")
        return results

    def _perceptual(
        self,
        trainer: Trainer,
        sets: dict[str, ImageFiles],
        pairs: Pairs,
        lesions: NDArray[np.int64],
        workers: int,
    ) -> dict[str, Any]:
        """Return LPIPS over the pairs; without its network, what the pairs would have been."""
        entry = {
            "n": len(pairs.fake),
            "skipped": [self.vocabulary.prompts[number] for number in pairs.skipped],
            "lesions": len(set(lesions[pairs.real])),
        }
        if self.lpips is None or not entry["n"]:
            return {"value": None, "interval": None, **entry}
        network = self.lpips.to(trainer.strategy.root_device)
        images = ImagePairs(sets["fake"], sets["test"], list(zip(*pairs[:2], strict=True)))
        (distances,) = extract(images, [lambda x: _lpips(network, x)], trainer, workers)
        estimate = clustered_mean(distances.double().numpy(), lesions[pairs.real])
        described = {"network": "LPIPS v0.1, AlexNet", "digest": weights_digest(network)}
        return {"value": estimate.value, "interval": estimate.interval, **entry, **described}

    def _image_sets(self, manifest: pd.DataFrame, data: ISICDataModule) -> dict[str, ImageFiles]:
        fakes = [self.samples.path_of(name) for name in manifest["id"]]
        with Image.open(fakes[0]) as first:
            size = first.width
        real = {
            name: ImageFiles(data.paths(_sorted(rows)), size, data.resize)
            for name, rows in (
                ("test", data.splits.test),
                ("train", data.splits.train),
            )
        }
        return {"fake": ImageFiles(fakes, size), **real}

    def _provenance(
        self, trainer: Trainer, pl_module: RewardFineTuning, manifest: pd.DataFrame
    ) -> dict[str, Any]:
        """Say what the numbers rest on; two runs compare only if all but the policy is equal."""
        reward = pl_module.reward
        read_with = reward.classifiers()
        rewarding = read_with[0] if len(read_with) == 1 else reward
        return {
            "sampler": settings_of(trainer, pl_module),
            "samples": len(manifest),
            "samples_folder": str(self.samples.root),
            "pipeline": str(pl_module.hparams.pipeline),
            "before_training": pl_module.before_training,
            "policy": pl_module.trained_from,
            "weights": weights_file(Path(pl_module.trained_from or pl_module.hparams.pipeline)),
            "judge": {
                "checkpoint": pl_module.hparams.judge,
                "digest": weights_digest(pl_module.scorer.judge.module),
            },
            "reward": {
                "class": reward.described(),
                "digest": weights_digest(rewarding) if has_weights(rewarding) else None,
            },
            "features": {name: n.described["digest"] for name, n in self.networks.items()},
            "data": data_provenance(self.data) if self.data is not None else None,
            "versions": versions(),
        }


def _sample_folder(trainer: Trainer, evaluation: Callback) -> SampleFolder:
    before = trainer.callbacks[: trainer.callbacks.index(evaluation)]
    folder = next((c for c in before if isinstance(c, SampleFolder)), None)
    if folder is None:
        raise UserError(
            "the callback Evaluation scores what SampleFolder keeps: put a SampleFolder before it "
            "under trainer.callbacks, as configs/ddpo.yaml does."
        )
    return folder


def _sorted(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.sort_values("id", ignore_index=True)


def _thumbnails(images: torch.Tensor) -> torch.Tensor:
    return thumbnails(images.float() / 255)


def _lpips(network: torch.nn.Module, pairs: torch.Tensor) -> torch.Tensor:
    one, other = (pairs.float() / 255).unbind(dim=1)
    with torch.autocast(pairs.device.type, enabled=False):
        return network(one, other, normalize=True).flatten()


def _read_by(judge: torch.nn.Module) -> Any:
    return lambda images: judge(images.float() / 255)


def _nearness(pair: list[str], distance: float, copy: bool) -> str:
    return f"{pair[0]} / {pair[1]} d={distance:.3f}{' COPY' if copy else ''}"
