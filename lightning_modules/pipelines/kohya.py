r"""Write exported adapters under the names that ComfyUI, AUTOMATIC1111 and sd-scripts read.

    python -m rl4med_ddpo.lightning_modules.pipelines.kohya \
        --lora runs/ddpo/policy --file runs/ddpo/policy.safetensors

These tools scale an adapter by its own `alpha` / rank; diffusers' conversion writes the rank for
alpha whatever it was.
"""

import json
from pathlib import Path

import torch
from diffusers.utils import convert_state_dict_to_kohya
from jsonargparse import auto_cli
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from rl4med_ddpo.foundation.errors import UserError

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"


def convert(lora: Path, file: Path) -> None:
    """Convert a folder of adapters.

    Args:
        lora: Folder that `fit` exported, with pytorch_lora_weights.safetensors in it.
        file: The .safetensors file to write.
    """
    source = lora / DIFFUSERS_FILE
    try:
        weights = load_file(source)
        with safe_open(source, framework="pt") as opened:
            metadata = opened.metadata() or {}
        config = json.loads(metadata["lora_adapter_metadata"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(
            f"{source} is no file of exported adapters ({type(error).__name__}: {error}). Give the "
            "folder that `fit` wrote with model.init_args.train: lora"
        ) from error
    peft = {
        name.replace(".lora.down.", ".lora_A.").replace(".lora.up.", ".lora_B."): tensor
        for name, tensor in weights.items()
    }
    converted = convert_state_dict_to_kohya(peft)
    alpha = torch.tensor(float(config["unet.lora_alpha"]))
    converted |= {name: alpha.clone() for name in converted if name.endswith(".alpha")}
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in converted.items()}, file)


if __name__ == "__main__":
    auto_cli(convert, as_positional=False)
