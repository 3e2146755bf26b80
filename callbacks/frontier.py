"""Score a model over classifier-free guidance, which lifts alignment without any training."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pandas as pd
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from rl4med_ddpo.callbacks.extraction import extract
from rl4med_ddpo.callbacks.sample_folder import SampleFolder, settings_of
from rl4med_ddpo.datamodules.file_digests import FileDigests
from rl4med_ddpo.datamodules.image_files import ImageFiles
from rl4med_ddpo.datamodules.isic import ISICDataModule
from rl4med_ddpo.datamodules.prompts import ISICPromptDataModule, PromptBatch
from rl4med_ddpo.datamodules.sample_tables import MANIFEST
from rl4med_ddpo.foundation.errors import UserError
from rl4med_ddpo.foundation.files import write_whole
from rl4med_ddpo.foundation.hashes import key_of
from rl4med_ddpo.foundation.progress import progress
from rl4med_ddpo.foundation.trainer import Trainer, products_folder
from rl4med_ddpo.lightning_modules.classifier import AttributeClassifier
from rl4med_ddpo.lightning_modules.reward_fine_tuning import RewardFineTuning
from rl4med_ddpo.metrics.alignment import exact, judged, prompt_numbers
from rl4med_ddpo.metrics.apr import as_asked
from rl4med_ddpo.metrics.frontier import (
    Scored,
    best_guidance,
    distance_to_real,
    frontier_point,
    right_diversity,
)
from rl4med_ddpo.metrics.intervals import cluster_numbers
from rl4med_ddpo.report.figures import frontier_figure
from rl4med_ddpo.report.results import FRONTIER, RESULTS


class Frontier(Callback):
    """Draws and scores the model at several guidances when `test` ends.

    Guidance costs nothing and lifts APR too, so a gain of training is one over the best guidance
    of the untrained model. For each guidance are measured APR, the reward, the diversity among the
    images that are read right, the distance to real images, and the worst prompts; the best one is
    that of the highest APR on validation noise. Writes `results/frontier.json` in the run folder,
    and a figure there and in TensorBoard. Started again, it measures what is missing.

    Args:
        guidances: Guidance scales, each at least 0; null measures nothing.
        samples_per_prompt: Images of each prompt at each guidance; null takes the data module's
            test_samples_per_prompt.
        real: Folder in ISIC 2019's layout whose images are the real ones; null takes the data
            module's test split.
    """

    def __init__(
        self,
        guidances: list[float] | None = None,
        samples_per_prompt: int | None = None,
        real: str | None = None,
    ) -> None:
        self.guidances = list(guidances or [])
        self.samples_per_prompt = samples_per_prompt
        self.real = None if real is None else Path(real)
        wrong = [f"{w:g}" for w in self.guidances if not w >= 0]
        twice = sorted({f"{w:g}" for w in self.guidances if self.guidances.count(w) > 1})
        if wrong or twice or (samples_per_prompt is not None and samples_per_prompt < 1):
            raise UserError(
                f"frontier: guidances={self.guidances}, samples_per_prompt={samples_per_prompt}: "
                "guidances are at least 0, each given once, and so many images a prompt at least "
                '1; for example --frontier.guidances "[1, 1.5, 2, 3, 5, 7.5]"'
            )

    def on_test_start(self, trainer: Trainer, pl_module: RewardFineTuning) -> None:
        """Refuse what cannot work before anything is drawn."""
        if not self.guidances:
            return
        data = trainer.datamodule
        if not isinstance(data, ISICPromptDataModule):
            raise UserError(
                f"frontier.guidances draws the prompts of an ISICPromptDataModule, not of "
                f"{type(data).__name__}"
            )
        if not data.validation_samples_per_prompt:
            raise UserError(
                "frontier.guidances finds the best guidance on validation noise: give "
                "--data.validation_samples_per_prompt at least 1"
            )
        if self.real is None and data.root is None:
            raise UserError(
                "frontier.guidances measures the distance to real images, and there are none: give "
                "their folder as --data.root or --frontier.real"
            )

    @torch.no_grad()
    def on_test_epoch_end(self, trainer: Trainer, pl_module: RewardFineTuning) -> None:
        """Measure each guidance; every process draws its share."""
        if not self.guidances:
            return
        data: ISICPromptDataModule = trainer.datamodule
        real = real_images(trainer, pl_module, self.real)
        settings = settings_of(trainer, pl_module)
        del settings["guidance"]
        number = self.samples_per_prompt or data.test_samples_per_prompt
        settings |= {
            "samples_per_prompt": number,
            "validation_samples_per_prompt": data.validation_samples_per_prompt,
            "real": real.digest,
        }
        folder = products_folder(trainer) / RESULTS
        points = []
        for done, guidance in enumerate(self.guidances):
            progress.report("guidance", done, len(self.guidances))
            file = folder / "frontier" / f"guidance_{guidance:g}.json"
            point = trainer.strategy.broadcast(_measured_before(file, settings))
            if point is None:
                point = self._measure(trainer, pl_module, data, real, guidance, number)
                if trainer.is_global_zero:
                    kept = {"settings": settings, "point": point}
                    write_whole(file, json.dumps(kept, indent=2) + "\n")
            points.append(point)
        result = {
            "model": pl_module.model_name if pl_module.trained_from else "SD",
            "guidance": pl_module.hparams.guidance,
            "best_guidance": best_guidance(points),
            "points": points,
            "real": {
                "diversity_right": right_diversity(real.scored, data.vocabulary.names),
                "n": len(real.scored.hits),
                "folder": real.folder,
            },
            "settings": settings,
        }
        if trainer.is_global_zero:
            self._write(trainer, folder, result)

    def _measure(
        self,
        trainer: Trainer,
        pl_module: RewardFineTuning,
        data: ISICPromptDataModule,
        real: "RealImages",
        guidance: float,
        samples_per_prompt: int,
    ) -> dict[str, Any]:
        names = data.vocabulary.names
        loader = data.eval_loader(data.validation_samples_per_prompt, data.predict_batch_size)
        validation, _ = draw_and_read(trainer, pl_module, loader, "validation", guidance)
        folder = next((c for c in trainer.callbacks if isinstance(c, SampleFolder)), None)
        own = guidance, samples_per_prompt
        if folder and own == (pl_module.hparams.guidance, data.test_samples_per_prompt):
            images, reward = drawn_for_test(trainer, pl_module, folder)
        else:
            loader = data.eval_loader(samples_per_prompt, data.predict_batch_size)
            images, reward = draw_and_read(trainer, pl_module, loader, "test", guidance)
        distance = distance_to_real(images, real.scored.features, real.lesions)
        return {
            "guidance": guidance,
            "val_apr": float(validation.hits.mean()),
            "reward": reward,
            **frontier_point(images, distance, names),
        }

    def _write(self, trainer: Trainer, folder: Path, result: dict[str, Any]) -> None:
        write_whole(folder / FRONTIER, json.dumps(result, indent=2) + "\n")
        figure = frontier_figure({result["model"]: result})
        figure.savefig(folder / "frontier.png")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_figure("test/frontier", figure)
        best = next(p for p in result["points"] if p["guidance"] == result["best_guidance"])
        rank_zero_info(
            f"best guidance of {result['model']}: {best['guidance']:g}, with an APR of "
            f"{best['apr']:.1%} over {best['n']:,} images; all in {folder / FRONTIER}"
        )


class RealImages(NamedTuple):
    """Real images as the judge sees them.

    Attributes:
        scored: Read right where the judge finds their labels; features in its last layer.
        lesions: Number of each one's lesion, `(N,)`.
        digest: Of the files' content; empty on all processes but the first.
        folder: Where they lie.
    """

    scored: Scored
    lesions: Tensor
    digest: str
    folder: str


def real_images(trainer: Trainer, policy: RewardFineTuning, root: Path | None) -> RealImages:
    """Read real images with the judge, on all processes together.

    Args:
        trainer: Its data module says how to read them.
        policy: Has the judge, and the size of the images.
        root: A folder in ISIC 2019's layout, of which all images count; None takes the data
            module's test split.
    """
    own: ISICPromptDataModule = trainer.datamodule
    data, vocabulary = own, own.vocabulary
    if root is not None:
        data = ISICDataModule(str(root), vocabulary=vocabulary, resize=own.resize)
    rows = pd.concat(data.splits) if root is not None else data.splits.test
    rows = rows.sort_values("id", ignore_index=True)
    paths, judge = data.paths(rows), policy.scorer.judge.module
    images = ImageFiles(paths, policy.model.image_size, own.resize)
    features, logits = extract(images, [_features(judge), _logits(judge)], trainer, own.num_workers)
    several = slice(len(vocabulary.any_of))
    asked = torch.tensor(rows[list(vocabulary.any_of)].to_numpy() == 1)
    hits = as_asked(logits[:, several] > 0, asked).numpy()
    return RealImages(
        Scored(hits, prompt_numbers(rows, vocabulary), features),
        torch.from_numpy(cluster_numbers(list(rows["lesion_id"]))),
        # compared and written by the first process alone
        key_of(*map(FileDigests(), paths)) if trainer.is_global_zero else "",
        str(root or own.root),
    )


def drawn_for_test(
    trainer: Trainer, policy: RewardFineTuning, folder: SampleFolder
) -> tuple[Scored, float]:
    """Return what `test` itself has drawn, and its mean reward.

    Args:
        trainer: Whose processes share the work.
        policy: Has the judge.
        folder: Where the images lie.
    """
    vocabulary = trainer.datamodule.vocabulary
    table = pd.read_csv(folder.root / MANIFEST).sort_values("id", ignore_index=True)
    images = ImageFiles([folder.path_of(name) for name in table["id"]], policy.model.image_size)
    judge, workers = policy.scorer.judge.module, trainer.datamodule.num_workers
    (features,) = extract(images, [_features(judge)], trainer, workers)
    hits = exact(table, judged(table, vocabulary), vocabulary)
    return Scored(hits, prompt_numbers(table, vocabulary), features), float(table["reward"].mean())


def draw_and_read(
    trainer: Trainer,
    policy: RewardFineTuning,
    batches: Iterable[PromptBatch],
    purpose: Literal["validation", "test"],
    guidance: float,
) -> tuple[Scored, float]:
    """Draw images at a guidance and read them with the judge, on all processes together.

    Args:
        trainer: Whose processes share the work.
        policy: Draws them.
        batches: Of prompts, dealt out to the processes.
        purpose: Which noise.
        guidance: Guidance scale.

    Returns:
        The images, in their order, and their mean reward.
    """
    found: list[tuple[int, Any]] = []
    judge, several = policy.scorer.judge.module, slice(policy.scorer.several)
    threads, at_first = torch.get_num_threads(), policy.model.guidance
    policy.model.guidance = guidance
    if policy.device.type == "cpu":
        # sums round by the number of threads
        torch.set_num_threads(1)
    try:
        for number, batch in enumerate(batches):
            if number % trainer.world_size != trainer.global_rank:
                continue
            drawn = policy.samples(batch, purpose)
            parts = drawn.images.split(policy.hparams.sample_batch)
            hits = as_asked(drawn.judge_logits[:, several] > 0, drawn.conditions[:, several].bool())
            read = hits, torch.cat([_features(judge)(part) for part in parts]), drawn.reward
            n = len(batch["prompt"])
            found.append((number, (batch["prompt_id"], *(column[:n].cpu() for column in read))))
    finally:
        policy.model.guidance = at_first
        torch.set_num_threads(threads)
    ranks: list[Any] = [found] * trainer.world_size
    if trainer.world_size > 1:
        torch.distributed.all_gather_object(ranks, found)
    parts = sorted((part for rank in ranks for part in rank), key=lambda part: part[0])
    prompts, hits, features, rewards = (
        torch.cat(column) for column in zip(*(part for _, part in parts), strict=True)
    )
    return Scored(hits.numpy(), prompts.numpy(), features), float(rewards.double().mean())


def _measured_before(file: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Return a point that was measured with the same settings."""
    try:
        kept = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return kept["point"] if kept.get("settings") == json.loads(json.dumps(settings)) else None


def _features(judge: AttributeClassifier) -> Callable[[Tensor], Tensor]:
    return lambda images: judge.features(images.float() / 255)


def _logits(judge: AttributeClassifier) -> Callable[[Tensor], Tensor]:
    return lambda images: judge(images.float() / 255)
