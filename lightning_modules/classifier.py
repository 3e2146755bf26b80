"""The attribute classifier: reward network with six heads, judge with the four artifacts."""

import inspect
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from timm.data import resolve_model_data_config
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MeanMetric

from rl4med_ddpo.datamodules.sampling import counted
from rl4med_ddpo.datamodules.vocabulary import DERMOSCOPY, Vocabulary
from rl4med_ddpo.foundation.checkpoints import read_checkpoint
from rl4med_ddpo.foundation.errors import UserError
from rl4med_ddpo.foundation.trainer import Trainer, require_precision
from rl4med_ddpo.lightning_modules.networks.backbone import (
    WEIGHTS,
    batch_statistics,
    build_backbone,
    check_backbone,
    pretrained_repo,
)
from rl4med_ddpo.lightning_modules.networks.pos_weight import (
    balanced_weights,
    given_weights,
    train_conditions,
)
from rl4med_ddpo.lightning_modules.networks.schedules import warmup_cosine
from rl4med_ddpo.lightning_modules.pipelines.source import cached_commit
from rl4med_ddpo.metrics.attribute_scores import AttributeScores

Batch = dict[str, Any]


class AttributeClassifier(L.LightningModule):
    """Tells which attributes a dermoscopic image has, each by a logit of its own.

    Args:
        backbone: Name of a timm architecture, such as efficientnet_b0 (the paper's).
        pretrained: Start from timm's ImageNet weights (true; fetched from the hub if not in its
            cache), from a .safetensors file of weights under timm's names, or from none (false).
        attributes: What the heads read, in the vocabulary's order: hair, gel_bubble, ruler, ink,
            MEL, NV. The reward network has all six, the judge the first four. null is all.
        vocabulary: The attributes of the data, in the order of their conditions. The command line
            takes it from the data module; a checkpoint carries it.
        image_size: Side in pixels to which images are resized before the network.
        dropout: Share of the pooled features dropped in training.
        pos_weight: Weight of the images that have an attribute, in the loss. none: 1. balanced:
            negatives / positives of the train split, so that both sides weigh the same; logits of
            rare attributes then lean towards "present". Or one number for each attribute by name.
        optimizer: Builds the optimizer; its learning rate is the peak of the schedule.
        warmup: Share of all steps in which the learning rate rises linearly from a 25th; then it
            falls along a cosine to 1e-6. The paper has no warm-up.
    """

    # narrower than Lightning declares them
    trainer: Trainer
    optimizers: Callable[[], LightningOptimizer]
    positive_weight: Tensor
    mean: Tensor
    std: Tensor

    schedule_follows_trainer = True
    """The learning rate falls until the end of the run: a resume compares the run's length."""

    def __init__(
        self,
        backbone: str = "efficientnet_b0",
        pretrained: bool | str = True,
        attributes: tuple[str, ...] | None = None,
        vocabulary: Vocabulary | dict[str, Any] = DERMOSCOPY,
        image_size: int = 224,
        dropout: float = 0.3,
        pos_weight: Literal["none", "balanced"] | dict[str, float] = "none",
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=1e-4, weight_decay=1e-4),
        warmup: float = 0.0,
    ) -> None:
        super().__init__()
        # a checkpoint keeps plain values, and gives them back as such
        known = vocabulary if isinstance(vocabulary, Vocabulary) else Vocabulary(**vocabulary)
        self.save_hyperparameters(ignore=["optimizer", "vocabulary"])
        self.save_hyperparameters({"vocabulary": asdict(known)})
        self.vocabulary = known
        self.attributes = known.attributes if attributes is None else tuple(attributes)
        self.columns = _columns(self.attributes, known)
        check_backbone(backbone, image_size)
        if not 0 <= warmup < 1:
            raise UserError(f"warmup is a share of the run in [0, 1), not {warmup}")
        self.backbone = backbone
        self.pretrained = pretrained
        self.image_size = image_size
        self.dropout = dropout
        self.pos_weight = pos_weight
        self.optimizer = optimizer
        self.warmup = warmup
        # whether the weights are more than random numbers
        self.trained = False
        # a network of timm, whose methods no type declares
        self.network: Any = None
        self.register_buffer("positive_weight", given_weights(pos_weight, self.attributes))
        self.val_scores = AttributeScores(self.attributes)
        self.test_scores = AttributeScores(self.attributes)
        # a loss that is NaN shows as NaN
        self.mean_loss = MeanMetric(nan_strategy="disable")

    def setup(self, stage: str) -> None:
        """Refuse data whose conditions mean something else, and what rounds the weights."""
        require_precision(self.trainer)
        data = getattr(self.trainer.datamodule, "vocabulary", self.vocabulary)
        require_same_attributes(data, {"the classifier": self.vocabulary})

    @classmethod
    def load_from_checkpoint(
        cls, checkpoint_path: str | Path, weights_only: bool = True, **options: Any
    ) -> "AttributeClassifier":
        """Load as Lightning does, also checkpoints of before 0.2, whose classes had other names.

        Args:
            checkpoint_path: What `fit` wrote.
            weights_only: Always true; an argument because Lightning has it.
            **options: As of Lightning: `map_location`, `strict`, and hyperparameters to replace.

        Raises:
            UserError: if the file is missing, damaged, or names a class that is not loaded.
        """
        known = read_checkpoint(Path(checkpoint_path)).get("hyper_parameters", {})
        return super().load_from_checkpoint(checkpoint_path, weights_only=True, **known | options)

    def configure_model(self) -> None:
        """Build the network; pretrained weights are of use to `fit` alone."""
        if self.network is not None:
            return
        fitting = self._trainer is None or self.trainer.state.fn == TrainerFn.FITTING
        pretrained = self.pretrained if fitting else False
        # here Lightning makes the GPU the default device, and it moves the networks later
        with torch.device("cpu"):
            self.network = build_backbone(
                self.backbone, pretrained, len(self.attributes), self.dropout, self.image_size
            )
            config = resolve_model_data_config(self.network)
            self.register_buffer("mean", torch.tensor(config["mean"]).view(3, 1, 1))
            self.register_buffer("std", torch.tensor(config["std"]).view(3, 1, 1))

    def load_state_dict(self, *args: Any, **options: Any) -> Any:
        """Load weights as torch does, and note that there are some."""
        loaded = super().load_state_dict(*args, **options)
        self.trained = True
        return loaded

    def on_test_start(self) -> None:
        """Refuse to score a network without trained weights."""
        if not (self.trained or self.trainer.state.fn == TrainerFn.FITTING):
            raise UserError(
                "the classifier has no trained weights to score: give the trainer its checkpoint "
                "as ckpt_path, or take AttributeClassifier.load_from_checkpoint(FILE)"
            )

    on_validation_start = on_predict_start = on_test_start

    def commits(self) -> dict[str, str | None]:
        """Return the commit of pretrained weights in the hub's cache, by the option naming them."""
        repo = pretrained_repo(self.backbone) if self.pretrained is True else None
        return {"pretrained": cached_commit(repo, WEIGHTS) if repo else None}

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimizer with its schedule, stepped once per optimizer step."""
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise UserError(
                "the learning rate falls to its minimum at the end of the run, so the run needs "
                "an end: set trainer.max_epochs (20 in the paper) or trainer.max_steps"
            )
        optimizer = self.optimizer(self.network.parameters())
        schedule = warmup_cosine(optimizer, int(steps), self.warmup)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits, `(B, H)`, of images `(B, 3, any, any)` in [0, 1]."""
        return self.network(self.prepared(images))

    def features(self, images: Tensor) -> Tensor:
        """Return what the last layer sees, `(B, D)`, of images `(B, 3, any, any)` in [0, 1]."""
        maps = self.network.forward_features(self.prepared(images))
        return self.network.forward_head(maps, pre_logits=True)

    def prepared(self, images: Tensor) -> Tensor:
        """Resize images in [0, 1] to the network's size and normalise them."""
        size = (self.image_size, self.image_size)
        if images.shape[-2:] != size:
            images = F.interpolate(images, size, mode="bilinear", antialias=True)
        return (images - self.mean) / self.std

    def on_train_start(self) -> None:
        """Count the train split for `pos_weight: balanced`."""
        self.trained = True
        if self.pos_weight == "balanced":
            counts = train_conditions(self.trainer.train_dataloader)[:, self.columns]
            self.positive_weight.copy_(balanced_weights(counts, self.attributes))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of one batch."""
        with batch_statistics(self.network, len(batch["image"])):
            loss = self._losses(self(batch["image"]), self.targets(batch)).mean()
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/lr", self.optimizers().param_groups[0]["lr"])
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Score one batch of the validation split."""
        self._evaluate(batch, self.val_scores)

    def on_validation_epoch_end(self) -> None:
        """Log the scores of the validation split."""
        self._log_scores("val", self.val_scores)

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Score one batch of the test split; return its `id`, `logits` and `targets`."""
        return self._evaluate(batch, self.test_scores)

    def on_test_epoch_end(self) -> None:
        """Log the scores of the test split."""
        self._log_scores("test", self.test_scores)

    def targets(self, batch: Batch) -> Tensor:
        """Return what the heads should say, `(B, H)` of 0 and 1: columns of the conditions."""
        return batch["condition"][:, self.columns]

    def _losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(
            logits, targets, pos_weight=self.positive_weight, reduction="none"
        )

    def _evaluate(self, batch: Batch, scores: AttributeScores) -> dict[str, Any]:
        """Count the images of a batch; those that other processes count as well are left out."""
        rows = counted(batch)
        logits, targets = self(batch["image"])[rows], self.targets(batch)[rows]
        if len(logits):
            scores.update(logits, targets.long())
            self.mean_loss.update(self._losses(logits, targets).mean(dim=1))
        ids = [name for name, counts in zip(batch["id"], rows.tolist(), strict=True) if counts]
        return {"id": ids, "logits": logits, "targets": targets}

    def _log_scores(self, split: str, scores: AttributeScores) -> None:
        self.log(f"{split}/loss", self.mean_loss.compute(), prog_bar=True)
        self.log_dict({f"{split}/{name}": score for name, score in scores.compute().items()})
        for metric in (self.mean_loss, scores):
            metric.reset()


def load_classifier(
    path: str | Path, heads: Literal["all", "judge"] | None = None
) -> AttributeClassifier:
    """Load a trained classifier for use: eval mode, frozen, float32, nothing fetched.

    Args:
        path: Checkpoint that `fit` wrote.
        heads: Attributes that the caller needs read: `all` of its vocabulary; those a `judge` may
            have, all or those of `any_of`; or whichever it reads (None).

    Raises:
        UserError: if the file is missing, damaged, no classifier's, or has other heads.
    """
    path = Path(path)
    checkpoint = _read_checkpoint(path)
    # as load_from_checkpoint does, which would read the file again
    options = inspect.signature(AttributeClassifier.__init__).parameters
    kept: dict[str, Any] = {"pretrained": False}
    kept = {k: v for k, v in checkpoint["hyper_parameters"].items() if k in options} | kept
    try:
        classifier = AttributeClassifier(**kept)
        classifier.configure_model()
        classifier.load_state_dict(checkpoint["state_dict"])
    except (RuntimeError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"the weights in {path} do not fit its settings: {error}") from error
    _require_heads(classifier, heads, path)
    return classifier.float().eval().requires_grad_(False)


def require_same_attributes(data: Vocabulary, readers: dict[str, Vocabulary]) -> None:
    """Refuse networks that were trained to read other attributes than the data have.

    Args:
        data: Of the data.
        readers: Of each network, by what it is.

    Raises:
        UserError: with both lists of attributes.
    """
    wrong = [
        f"  {name}: {', '.join(reader.attributes)}"
        for name, reader in readers.items()
        if reader.attributes != data.attributes
    ]
    if wrong:
        raise UserError(
            f"the data have the attributes {', '.join(data.attributes)}; others read\n"
            + "\n".join(wrong)
            + "\n  Give the data module the vocabulary that they were trained with, or train again"
        )


def _require_heads(
    classifier: AttributeClassifier, heads: Literal["all", "judge"] | None, path: Path
) -> None:
    vocabulary, found = classifier.vocabulary, classifier.attributes
    every, several = vocabulary.attributes, vocabulary.any_of
    allowed = {"all": [every], "judge": [every, several], None: [found]}[heads]
    if found not in allowed:
        needed = "\n".join(f"  needed ({len(a)}): {', '.join(a)}" for a in dict.fromkeys(allowed))
        raise UserError(
            f"the classifier {path} has other heads than needed.\n{needed}\n"
            f"  found  ({len(found)}): {', '.join(found)}\n"
            "  The reward network reads all attributes (classifier.yaml), the judge all, or those "
            "that an image may show any of (judge.yaml)"
        )


def _read_checkpoint(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(
            f"there is no classifier at {path}. Train it first:\n"
            "  reward network: rl4med-ddpo fit --config classifier.yaml\n"
            "  judge:          rl4med-ddpo fit --config judge.yaml\n"
            "  (demo/classifier.yaml and demo/judge.yaml for the demo)"
        )
    checkpoint = read_checkpoint(path)
    known = isinstance(checkpoint, dict) and checkpoint.get("hyper_parameters", {})
    if not known or "backbone" not in known or "positive_weight" not in checkpoint["state_dict"]:
        raise UserError(f"{path} is a readable checkpoint, but not of an AttributeClassifier")
    return checkpoint


def _columns(attributes: tuple[str, ...], vocabulary: Vocabulary) -> list[int]:
    known = vocabulary.attributes
    ordered = tuple(a for a in known if a in attributes)
    if not attributes or ordered != attributes:
        raise UserError(
            f"attributes of the classifier: {', '.join(attributes) or 'none'}.\n"
            f"  Allowed: some of {', '.join(known)}, each once and in this order"
        )
    return [known.index(a) for a in attributes]
