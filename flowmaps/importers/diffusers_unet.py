"""diffusers' UNet2DModel, with noise prediction."""

import json
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors.torch import load_file

from flowmaps.importers.build import Source, Weights, attention_weights, layer, layers
from flowmaps.importers.pickles import check_not_expanded, read_tensors
from flowmaps.networks.layers import u_shape

# Structure of a UNet2DModel, which is the class's default; a config that differs is refused.
ALWAYS: dict[str, Any] = {
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "mid_block_scale_factor": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "act_fn": "silu",
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
}
CHOICES = ("norm_eps", "flip_sin_to_cos", "freq_shift", "downsample_padding", "attention_head_dim")
DEFAULTS = (1e-5, True, 0, 1, 8)
KINDS = {DEFAULTS: "diffusers", (1e-6, False, 1, 0, None): "ddpm"}
NOISING: dict[str, Any] = {
    "prediction_type": "epsilon",
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
}


def diffusers_unet(path: Path) -> Source:
    """Read the folder of a ``UNet2DModel``, or of its pipeline: noise prediction at DDPM's times."""
    folder = path / "unet" if (path / "unet").is_dir() else path
    config = _json(folder / "config.json")
    for key, value in ALWAYS.items():
        if config.get(key, value) != value:
            raise UnpicklingError(f"its {key} is {config[key]}, and only {value} has a network here")
    kind = tuple(config.get(key, default) for key, default in zip(CHOICES, DEFAULTS, strict=True))
    if kind not in KINDS:
        raise UnpicklingError(f"its {', '.join(CHOICES)} are {kind}, and only {' or '.join(map(str, KINDS))} are known")
    for scheduler in (path / "scheduler", path.parent / "scheduler"):
        if (file := scheduler / "scheduler_config.json").is_file():
            noising = _json(file)
            for key, value in NOISING.items():
                if noising.get(key, value) != value:
                    raise UnpicklingError(f"its scheduler's {key} is {noising[key]}, and only {value} is known")
            break
    w, file = _diffusers_weights(folder)
    widths, each = tuple(config["block_out_channels"]), int(config.get("layers_per_block", 2))
    size, channels, levels = int(config["sample_size"]), int(config["in_channels"]), len(widths)
    if any(width % 32 or width < 128 or width % widths[0] for width in widths):
        raise UnpicklingError(f"its block_out_channels are {widths}, and 32 groups of at least 4 need multiples of 128")
    types = config["down_block_types"]
    if set(types) - {"DownBlock2D", "AttnDownBlock2D"}:
        raise UnpicklingError(f"its down_block_types are {types}, and only DownBlock2D and AttnDownBlock2D are known")
    ours: Weights = {
        **layer("embedding.start.0", w, "time_embedding.linear_1."),
        **layer("embedding.start.2", w, "time_embedding.linear_2."),
        **layer("stem", w, "conv_in."),
        **layer("head.0", w, "conv_norm_out."),
        **layer("head.2", w, "conv_out."),
    }
    if KINDS[kind] == "ddpm":  # sines first
        ours["embedding.start.0.weight"] = torch.roll(ours["embedding.start.0.weight"], widths[0] // 2, dims=1)
    classes = int(config.get("num_class_embeds") or 0)
    if classes:
        table = w["class_embedding.weight"]
        ours["embedding.label.weight"] = torch.cat([table, torch.zeros_like(table[:1])])
    down, up = u_shape(size, widths[0], widths, each)
    for side, stages, step in (("down", down, "downsamplers"), ("up", up, "upsamplers")):
        level = index = 0
        for n, stage in enumerate(stages):
            theirs = f"{side}_blocks.{level}"
            if stage.resample == "keep":
                ours |= _diffusers_block(
                    w, f"{side}.{n}", f"{theirs}.resnets.{index}.", f"{theirs}.attentions.{index}."
                )
                index += 1
            else:
                level, index = level + 1, 0
                ours |= layer(f"{side}.{n}.conv", w, f"{theirs}.{step}.0.conv.")
    for n in range(2):
        ours |= _diffusers_block(w, f"middle.{n}", f"mid_block.resnets.{n}.", f"mid_block.attentions.{n}.")
    options = {
        "image_size": size,
        "channels": channels,
        "width": widths[0],
        "channel_mult": tuple(width // widths[0] for width in widths),
        "blocks": each,
        "attention_resolutions": tuple(size >> level for level in range(levels) if types[level] == "AttnDownBlock2D"),
        "dropout": float(config.get("dropout", 0.0)),
        "num_classes": classes,
        "data_std": 1.0,
        "variant": KINDS[kind],
        "convention": "ddpm",
        "base_std": 1.0,
    }
    return Source("UNet", options, ours, file=file)


def _diffusers_block(w: Weights, place: str, block: str, attention: str) -> Weights:
    names = {name: f"{block}{name}" for name in ("norm1", "conv1", "norm2", "conv2")}
    ours = layers(place, w, names | {"modulation": f"{block}time_emb_proj", "skip": f"{block}conv_shortcut"})
    for q, k, v, out in (
        ("to_q", "to_k", "to_v", "to_out.0"),
        ("query", "key", "value", "proj_attn"),
    ):  # current and former names
        if f"{attention}{q}.weight" in w:
            weight, bias = (
                torch.cat([w[f"{attention}{name}.{key}"] for name in (q, k, v)]) for key in ("weight", "bias")
            )
            ours |= layer(f"{place}.attention.norm", w, f"{attention}group_norm.")
            ours |= attention_weights(place, weight, bias, w[f"{attention}{out}.weight"], w[f"{attention}{out}.bias"])
    return ours


def _diffusers_weights(folder: Path) -> tuple[Weights, Path]:
    file = folder / "diffusion_pytorch_model.safetensors"
    if file.is_file():
        return load_file(file), file
    file = file.with_suffix(".bin")
    return {name: check_not_expanded(tensor) for name, tensor in read_tensors(file).items()}, file


def _json(file: Path) -> dict[str, Any]:
    values = json.loads(file.read_bytes())
    if not isinstance(values, dict):
        raise UnpicklingError(f"{file.name} is not a JSON object")
    return values
