"""The options that every DDPO benchmark takes, so that two tools run the same thing.

Needs nothing but Python, for the other tools live in environments of their own.
"""

import argparse

PROMPT = "a dermoscopic image with melanoma (MEL) showing hair"


def ddpo_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser of what decides a DDPO run."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("pipeline", help="folder of a Stable Diffusion pipeline in the diffusers layout")
    add("--steps", type=int, default=20, help="denoising steps T")
    add("--samples", type=int, default=16, help="images an epoch, all of one prompt")
    add("--sample-batch", type=int, default=16, help="images sampled at a time")
    add("--micro-batch", type=int, default=8, help="(sample, step) pairs a training pass")
    add("--updates", type=int, default=2, help="optimizer steps an epoch")
    add("--epochs", type=int, default=5, help="epochs, with the warm-up")
    add("--warmup", type=int, default=1, help="first epochs that no figure counts")
    add("--guidance", type=float, default=5.0, help="in sampling and in training")
    add("--train", choices=("lora", "full"), default="lora", help="rank 4, or the whole U-Net")
    add("--lr", type=float, default=3e-4, help="of AdamW")
    add("--clip-range", type=float, default=1e-4, help="of the ratio")
    add("--precision", choices=("32", "bf16"), default="32", help="of the U-Net's forward")
    add("--reward", choices=("brightness",), default="brightness", help="what an image earns")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where it runs")
    add("--seed", type=int, default=0, help="of noise and adapters")
    return parser


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Return the command line's options, with the warm-up shorter than the run."""
    options = parser.parse_args()
    if not 0 <= options.warmup < options.epochs:
        parser.error(
            f"--warmup {options.warmup}: allowed are 0 to {options.epochs - 1}, for at least one "
            "epoch must remain to be timed"
        )
    return options
