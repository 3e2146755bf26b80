"""What fine-tuning and DDPO share: a pipeline whose U-Net is trained, and images drawn from it."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from diffusers import UNet2DConditionModel
from lightning.fabric.utilities.data import AttributeDict
from torch import Tensor, nn

from rl4med_ddpo.foundation.checkpoints import read_checkpoint
from rl4med_ddpo.foundation.progress import progress
from rl4med_ddpo.foundation.trainer import Trainer, require_precision
from rl4med_ddpo.lightning_modules.diffusion.latent_diffusion import DDIMSchedule, LatentDiffusion
from rl4med_ddpo.lightning_modules.diffusion.prompt_tokens import require_distinct
from rl4med_ddpo.lightning_modules.pipelines.load import load_pipeline, save_pipeline
from rl4med_ddpo.lightning_modules.pipelines.source import cached_commit, is_hub_id


class TextToImage(L.LightningModule):
    """A LightningModule that trains the U-Net of a Stable Diffusion pipeline.

    Subclasses have the hyperparameters `pipeline`, `unet`, `steps`, `eta`, `guidance` and
    `sample_batch`.

    Attributes:
        awaits_checkpoint: Whether the weights of a checkpoint follow once the networks are built.
        trained_from: Where the U-Net's trained weights come from: a file or folder, or `fit`; None
            while they are the pipeline's.
    """

    model: LatentDiffusion
    # narrower than Lightning declares them
    hparams: AttributeDict
    trainer: Trainer

    def __init__(self) -> None:
        super().__init__()
        self.awaits_checkpoint = False
        self.trained_from: str | None = None
        self.register_load_state_dict_pre_hook(_rename_former_weights)

    @classmethod
    def load_from_checkpoint(
        cls, checkpoint_path: str | Path, weights_only: bool = True, **options: Any
    ) -> "TextToImage":
        """Load as Lightning does, also checkpoints of before 0.2, whose classes had other names.

        Args:
            checkpoint_path: What `fit` wrote.
            weights_only: Always true; an argument because Lightning has it.
            **options: As of Lightning: `map_location`, `strict`, and hyperparameters to replace.

        Raises:
            UserError: if the file is missing, damaged, or names a class that is not loaded.
        """
        known = read_checkpoint(Path(checkpoint_path)).get("hyper_parameters", {}) | options
        if "policy" in known:
            # the weights are the checkpoint's, not those exported before or after it
            known["policy"] = None
        module = super().load_from_checkpoint(checkpoint_path, weights_only=True, **known)
        module.trained_from = str(checkpoint_path)
        return module

    def setup(self, stage: str) -> None:
        """Refuse a precision that changes the weights' type."""
        require_precision(self.trainer)

    def configure_model(self) -> None:
        """Load the pipeline and take it apart; done once."""
        if hasattr(self, "model"):
            return
        # here Lightning makes the GPU the default device, and it moves the networks later
        with torch.device("cpu"):
            pipeline = load_pipeline(self.hparams.pipeline, self.hparams.unet)
            self.prepare_unet(pipeline.unet)
            p = self.hparams
            data = self._trainer and getattr(self.trainer.datamodule, "prompts", None)
            require_distinct(data or (), pipeline.tokenizer)
            self.model = LatentDiffusion(pipeline, p.steps, p.eta, p.guidance)

    def on_train_start(self) -> None:
        """Note that the weights are no longer what was loaded."""
        self.trained_from = "fit"

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note which file the weights come from."""
        if self._trainer:
            self.trained_from = str(self.trainer.ckpt_path)

    def prepare_unet(self, unet: UNet2DConditionModel) -> None:
        """Decide which of the U-Net's parameters are trained."""
        raise NotImplementedError

    def rollout_schedule(self) -> DDIMSchedule:
        """Return the transitions by which samples are drawn to train on."""
        return self.model.schedule

    def trained_parameters(self) -> list[nn.Parameter]:
        """List what the optimizer moves."""
        return [p for p in self.model.unet.parameters() if p.requires_grad]

    @torch.no_grad()
    def generate(self, prompts: list[str], noise_keys: Tensor) -> Tensor:
        """Draw one image a prompt, in [0, 1], `(B, 3, H, W)`.

        Args:
            prompts: B texts.
            noise_keys: `(B,)` int64; image i depends on (prompt i, key i) alone.
        """
        images, size = [], self.hparams.sample_batch
        for first in range(0, len(prompts), size):
            part = slice(first, first + size)
            with self.trainer.precision_plugin.forward_context():
                images.append(self.model.sample(prompts[part], noise_keys[part]))
            progress.report("sampling", min(part.stop, len(prompts)), len(prompts))
        return torch.cat(images)

    def export(self, folder: Path) -> None:
        """Write what was trained in the diffusers format."""
        save_pipeline(self.model.assembled(), folder)

    def commits(self) -> dict[str, str | None]:
        """Return the commit of a hub id in the hub's cache, by the option that names it."""
        source = self.hparams.pipeline
        return {"pipeline": cached_commit(source) if is_hub_id(source) else None}

    def networks(self) -> dict[str, nn.Module]:
        """Name the networks that decide an image."""
        names = ("text_encoder", "vae", "unet", "schedule")
        return {name: getattr(self.model, name) for name in names}


def _rename_former_weights(
    module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any
) -> None:
    """Read weights of before 0.2: what is `model.unet.*` today was `unet.*` then."""
    for name in [name for name in state_dict if name.startswith(f"{prefix}unet.")]:
        state_dict[f"{prefix}model.{name.removeprefix(prefix)}"] = state_dict.pop(name)
