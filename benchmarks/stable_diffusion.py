"""Fine-tuning next to the loop of diffusers' text-to-image script, on one pipeline and folder.

    python -m benchmarks.stable_diffusion --pipeline assets/base --root FOLDER --size 64

The script (examples/text_to_image/train_text_to_image.py of huggingface/diffusers) is not part of
the package. What runs here in its place is its documented loop, written down again: decode, resize,
flip and normalise; encode the image and the prompt in every step; noise prediction; clip; AdamW.
What accelerate adds to a step is left out, in its favour. Ours is the real command's Trainer with
the whole module. Both read the same images with the same number of workers, in the same precision.

Prints JSON. CPU seconds are those of this process with all its threads; where other programs share
the machine they are the number to compare on a CPU, and wall seconds on an idle machine or a GPU.
"""

import gc
import json
import logging
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
import torch.nn.functional as F
from jsonargparse import auto_cli
from lightning.pytorch.callbacks import Callback
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from benchmarks.measure import Seconds, now
from rl4med_ddpo.datamodules.isic import ISICDataModule, ISICDataset
from rl4med_ddpo.lightning_modules import StableDiffusion
from rl4med_ddpo.lightning_modules.diffusion.lora import add_lora
from rl4med_ddpo.lightning_modules.pipelines.load import load_pipeline

WARM_UP = 2
Times = list[Seconds]
Precision = Literal["32-true", "bf16-mixed"]


class ScriptImages(Dataset[dict[str, Any]]):
    """The script's preprocessing: decode, resize, crop, flip, normalise, tokenize.

    Args:
        images: Whose files and prompts to take.
        tokenizer: Of the pipeline.
    """

    def __init__(self, images: ISICDataset, tokenizer: Any) -> None:
        self.images, self.tokenizer = images, tokenizer
        self.transform = transforms.Compose(
            [
                transforms.Resize(images.size, transforms.InterpolationMode.BILINEAR),
                transforms.CenterCrop(images.size),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize([0.5], [0.5]),
            ]
        )
        self.prompts = [images.prompt(row) for row in range(len(images))]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> dict[str, Any]:
        """Read an image and its prompt's tokens."""
        with Image.open(self.images.paths[row]) as image:
            pixels = self.transform(image.convert("RGB"))
        ids = self.tokenizer(
            self.prompts[row], max_length=self.tokenizer.model_max_length, padding="max_length",
            truncation=True, return_tensors="pt",
        ).input_ids[0]  # fmt: skip
        return {"pixel_values": pixels, "input_ids": ids}


def script_loop(
    pipeline: str, data: ISICDataModule, train: str, precision: Precision, steps: int
) -> Times:
    """Run the script's loop, and return the times at the end of each step."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    half = precision == "bf16-mixed"
    dtype = torch.bfloat16 if half else torch.float32
    parts = load_pipeline(pipeline)
    unet = parts.unet.to(device).train()
    vae, text_encoder = parts.vae.to(device, dtype), parts.text_encoder.to(device, dtype)
    if train == "lora":
        add_lora(unet, rank=4, seed=0)
    else:
        unet.requires_grad_(True)
    trained = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=1e-2)
    ends = [now()]
    for batch in _endless(ScriptImages(data.train_set, parts.tokenizer), data):
        pixels, ids = batch["pixel_values"].to(device, dtype), batch["input_ids"].to(device)
        with torch.autocast(device.type, torch.bfloat16) if half else nullcontext():
            latents = vae.encode(pixels).latent_dist.sample() * vae.config.scaling_factor
            noise = torch.randn_like(latents)
            timesteps = torch.randint(0, 1000, (len(latents),), device=device)
            noisy = parts.scheduler.add_noise(latents, noise, timesteps)
            states = text_encoder(ids, return_dict=False)[0]
            predicted = unet(noisy, timesteps, states, return_dict=False)[0]
        loss = F.mse_loss(predicted.float(), noise.float(), reduction="mean")
        loss.item()  # the script gathers the loss in every step
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ends.append(now())
        if len(ends) > steps:
            return ends
    raise AssertionError


def _endless(images: ScriptImages, data: ISICDataModule) -> Iterator[dict[str, Any]]:
    while True:
        yield from DataLoader(
            images, data.batch_size, shuffle=True, drop_last=True, num_workers=data.num_workers
        )


class Clock(Callback):
    """Notes the times at the end of each step."""

    def __init__(self) -> None:
        self.ends: Times = []

    def on_train_start(self, *_: Any) -> None:
        """Start."""
        self.ends.append(now())

    def on_train_batch_end(self, *_: Any) -> None:
        """Note a step's end."""
        self.ends.append(now())


def our_loop(
    pipeline: str,
    data: ISICDataModule,
    train: Literal["lora", "full"],
    precision: Precision,
    steps: int,
    cache: str | None,
) -> Times:
    """Train with the module and Lightning's Trainer; filling the cache is not in the times."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator="auto", devices=1, precision=precision, max_steps=steps,
            gradient_clip_val=1.0, callbacks=[clock], default_root_dir=folder, logger=False,
            limit_val_batches=0, num_sanity_val_steps=0, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(StableDiffusion(pipeline, train=train, cache=cache), datamodule=data)
    # trainer and module hold each other: two full-size ones would not fit into 24 GiB
    del trainer
    gc.collect()
    return clock.ends


def rates(loops: list[Times], batch_size: int) -> dict[str, float]:
    """Return images a second by wall and by CPU time: the median step, the first ones left out."""
    steps = [[end - start for start, end in pairwise(ends)][WARM_UP:] for ends in loops]
    wall, cpu = zip(*chain.from_iterable(steps), strict=True)
    return {
        "images_per_second": round(batch_size / statistics.median(wall), 3),
        "images_per_cpu_second": round(batch_size / max(statistics.median(cpu), 1e-9), 3),
    }


def ratios(measured: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Return our rates as multiples of the script's."""
    base = measured["diffusers_script"]
    return {
        name: {k: round(v / base[k], 2) for k, v in rate.items()}
        for name, rate in measured.items()
        if name != "diffusers_script"
    }


def compare(
    pipeline: str,
    root: str,
    size: int,
    split: str = "paper",
    train: Literal["full", "lora"] = "full",
    batch_size: int = 8,
    num_workers: int = 0,
    precision: Precision = "32-true",
    steps: int = 12,
    rounds: int = 1,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure the script's loop, ours without a cache, and ours with one.

    Args:
        pipeline: Folder, file or hub id.
        root: ISIC folder.
        size: Side of the images in pixels.
        split: See `ISICDataModule`.
        train: The whole U-Net, or adapters.
        batch_size: Images a step.
        num_workers: Processes that read images; 0 counts reading among the CPU seconds.
        precision: Of both.
        steps: Steps of each loop; the first two are not counted.
        rounds: How often the three loops run in turn, for a machine that others slow down.
        seed: Of the weights that start at random, and of the data's order.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    L.seed_everything(seed, verbose=False)

    def data() -> ISICDataModule:
        made = ISICDataModule(
            root, split=split, size=size, batch_size=batch_size, num_workers=num_workers, seed=seed
        )
        made.setup("fit")
        return made

    loops: dict[str, list[Times]] = {"diffusers_script": [], "ours": [], "ours_cached": []}
    with tempfile.TemporaryDirectory() as cache:
        for _ in range(rounds):
            ours = (pipeline, data(), train, precision, steps)
            loops["diffusers_script"].append(script_loop(*ours))
            loops["ours"].append(our_loop(*ours, cache=None))
            loops["ours_cached"].append(our_loop(*ours, cache=str(Path(cache))))
    measured = {name: rates(times, batch_size) for name, times in loops.items()}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    settings = {"pipeline": pipeline, "size": size, "train": train, "batch_size": batch_size}
    settings |= {"precision": precision, "steps": steps, "rounds": rounds}
    settings |= {"num_workers": num_workers}
    settings |= {"device": device, "threads": torch.get_num_threads()}
    return {"settings": settings, "measured": measured, "times_the_script": ratios(measured)}


if __name__ == "__main__":
    print(json.dumps(auto_cli(compare, as_positional=False), indent=2))
