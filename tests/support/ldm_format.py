"""Write a pipeline as the single file of the original Stable Diffusion code.

The names are those of CompVis' `ldm`; the correspondence is the one that diffusers documents in
`scripts/convert_diffusers_to_original_stable_diffusion.py`, for any number of levels.
"""

import re

from safetensors.torch import save_file

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def unet_name(name, config):
    layers = config.layers_per_block
    if found := re.fullmatch(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.+)", name):
        side, level, kind, j, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
        if side == "down":
            block = (layers + 1) * level + (layers + 1 if kind == "downsamplers" else j + 1)
            place, part = f"input_blocks.{block}", {"downsamplers": "0"}
            rest = rest.replace("conv.", "op.") if kind == "downsamplers" else rest
        else:
            attends = config.up_block_types[level].startswith("CrossAttn")
            block = (layers + 1) * level + (layers if kind == "upsamplers" else j)
            place, part = f"output_blocks.{block}", {"upsamplers": "2" if attends else "1"}
        part = ({"resnets": "0", "attentions": "1"} | part)[kind]
        return f"{place}.{part}.{resnet(rest) if kind == 'resnets' else rest}"
    if found := re.fullmatch(r"mid_block\.(\w+)\.(\d)\.(.+)", name):
        if found[1] == "attentions":
            return f"middle_block.1.{found[3]}"
        return f"middle_block.{2 * int(found[2])}.{resnet(found[3])}"
    stem, _, end = name.rpartition(".")
    return f"{UNET_ENDS[stem]}.{end}"


def resnet(rest):
    stem, _, end = rest.rpartition(".")
    return f"{RESNET[stem]}.{end}"


def vae_name(name, config):
    last = len(config.block_out_channels) - 1
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    if "mid_block.attentions.0." in name:
        head, rest = name.split("mid_block.attentions.0.")
        stem, _, end = rest.rpartition(".")
        return f"{head}mid.attn_1.{ATTENTION[stem]}.{end}"
    name = re.sub(r"down_blocks\.(\d)\.resnets\.", r"down.\1.block.", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets\.", lambda m: f"up.{last - int(m[1])}.block.", name)
    return re.sub(
        r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{last - int(m[1])}.upsample", name
    )


def write_single_file(pipeline, path):
    tensors = {
        f"model.diffusion_model.{unet_name(name, pipeline.unet.config)}": tensor
        for name, tensor in pipeline.unet.state_dict().items()
    }
    for name, tensor in pipeline.vae.state_dict().items():
        ldm = vae_name(name, pipeline.vae.config)
        if ".attn_1." in ldm and ldm.endswith("weight") and ".norm." not in ldm:
            tensor = tensor[:, :, None, None]
        tensors[f"first_stage_model.{ldm}"] = tensor
    for name, tensor in pipeline.text_encoder.state_dict().items():
        tensors[f"cond_stage_model.transformer.text_model.{name}"] = tensor
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return tensors
