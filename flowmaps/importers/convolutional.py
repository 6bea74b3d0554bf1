"""Rectified flow's DDPM++ (in the code of Song et al. 2021) and diffusers' UNet2DModel."""

import itertools
import json
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from flowmaps.importers.build import Source
from flowmaps.importers.pickles import read_tensors, whole
from flowmaps.networks.layers import u_shape

Weights = dict[str, Tensor]


def rectified_flow(path: Path) -> Source:
    """``checkpoint_*.pth`` of rectified flow, as BOSS takes them, for 32 x 32 images: the EMA of a DDPM++.

    The average is a bare list, in the order of the trained parameters of ``model``.
    """
    content = read_tensors(path)
    if not isinstance(content, dict) or not all(isinstance(content.get(k), dict) for k in ("model", "ema")):
        raise UnpicklingError("it has no model and no ema")
    model = {name.removeprefix("module."): tensor for name, tensor in content["model"].items()}
    trained = {name: tensor for name, tensor in model.items() if name.startswith("all_modules.")}
    shadow = content["ema"].get("shadow_params")
    if not isinstance(shadow, list) or [w.shape for w in shadow] != [w.shape for w in trained.values()]:
        raise UnpicklingError("it is no DDPM++: its ema does not have the parameters of its model, in that order")
    parts: dict[int, Weights] = {}
    for name, tensor in zip(trained, shadow, strict=True):
        _, number, key = name.split(".", 2)
        parts.setdefault(int(number), {})[key] = whole(tensor)
    linear1, linear2, stem, *inside, norm, conv = (parts[i] for i in range(len(parts)))
    blocks: list[tuple[Weights, Weights | None]] = []  # each with the attention after it
    for part in inside:
        if "NIN_0.W" in part and blocks:
            blocks[-1] = (blocks[-1][0], part)
        else:
            blocks.append((part, None))
    resampling = [_inputs(block) == _outputs(block) and "Conv_2.weight" in block for block, _ in blocks]
    levels = 1 + sum(resampling) // 2
    each = (len(blocks) - 2 - 2 * (levels - 1) - levels) // (2 * levels)
    (width, channels), size = stem["weight"].shape[:2], 32
    kept = [pair for pair, change in zip(blocks, resampling, strict=True) if not change][: levels * each : each]
    attention = tuple(size >> level for level, (_, attends) in enumerate(kept) if attends is not None)
    mult = tuple(_outputs(block) // width for block, _ in kept)
    first = levels * each + levels - 1  # of the middle
    ours: Weights = {
        "embedding.start.0.weight": torch.roll(linear1["weight"], width // 2, dims=1),  # sines first
        "embedding.start.0.bias": linear1["bias"],
        **_renamed("embedding.start.2", linear2),
        **_renamed("stem", stem),
        **_renamed("head.0", norm),
        **_renamed("head.2", conv),
    }
    names = {"norm1": "GroupNorm_0", "conv1": "Conv_0", "modulation": "Dense_0", "norm2": "GroupNorm_1"}
    names |= {"conv2": "Conv_1", "skip": "Conv_2"}
    for n, (block, attends) in enumerate(blocks):
        place = f"down.{n}" if n < first else f"middle.{n - first}" if n < first + 2 else f"up.{n - first - 2}"
        ours |= _parts(place, block, names)
        if attends is not None:
            ours |= _renamed(f"{place}.attention.norm", attends, "GroupNorm_0.")
            qkv = [attends[f"NIN_{i}.W"].T for i in range(3)], [attends[f"NIN_{i}.b"] for i in range(3)]
            out = attends["NIN_3.W"].T, attends["NIN_3.b"]
            ours |= _attention(place, torch.cat(qkv[0]), torch.cat(qkv[1]), *out)
    options = {
        "image_size": size,
        "channels": channels,
        "width": width,
        "channel_mult": mult,
        "blocks": each,
        "attention_resolutions": attention,
        "num_classes": 0,
        "variant": "ddpm++",
        "convention": "rectified_flow",
        "base_std": 1.0,
    }
    return Source("UNet", options, ours)


def _inputs(block: Weights) -> int:
    return block["Conv_0.weight"].shape[1]


def _outputs(block: Weights) -> int:
    return block["Conv_0.weight"].shape[0]


def _renamed(place: str, part: Weights, prefix: str = "") -> Weights:
    return {f"{place}.{key}": part[f"{prefix}{key}"] for key in ("weight", "bias")}


def _parts(place: str, weights: Weights, names: dict[str, str]) -> Weights:
    found = {mine: theirs for mine, theirs in names.items() if f"{theirs}.weight" in weights}
    pairs = (_renamed(f"{place}.{mine}", weights, f"{theirs}.").items() for mine, theirs in found.items())
    return dict(itertools.chain(*pairs))


def _attention(place: str, qkv: Tensor, qkv_bias: Tensor, out: Tensor, out_bias: Tensor) -> Weights:
    """Matrices as the 1 x 1 convolutions that they are here."""
    made = {"qkv.weight": qkv[:, :, None, None], "qkv.bias": qkv_bias}
    made |= {"out.weight": out[:, :, None, None], "out.bias": out_bias}
    return {f"{place}.attention.{name}": tensor for name, tensor in made.items()}


# What a UNet2DModel is made of, with the class's defaults; a config that says otherwise is refused.
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
    """A folder of ``UNet2DModel``, or a pipeline's with ``unet`` and ``scheduler``: noise prediction, DDPM's times."""
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
        **_renamed("embedding.start.0", w, "time_embedding.linear_1."),
        **_renamed("embedding.start.2", w, "time_embedding.linear_2."),
        **_renamed("stem", w, "conv_in."),
        **_renamed("head.0", w, "conv_norm_out."),
        **_renamed("head.2", w, "conv_out."),
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
                ours |= _renamed(f"{side}.{n}.conv", w, f"{theirs}.{step}.0.conv.")
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
    ours = _parts(place, w, names | {"modulation": f"{block}time_emb_proj", "skip": f"{block}conv_shortcut"})
    for q, k, v, out in (("to_q", "to_k", "to_v", "to_out.0"), ("query", "key", "value", "proj_attn")):  # now, and once
        if f"{attention}{q}.weight" in w:
            weight, bias = (
                torch.cat([w[f"{attention}{name}.{key}"] for name in (q, k, v)]) for key in ("weight", "bias")
            )
            ours |= _renamed(f"{place}.attention.norm", w, f"{attention}group_norm.")
            ours |= _attention(place, weight, bias, w[f"{attention}{out}.weight"], w[f"{attention}{out}.bias"])
    return ours


def _diffusers_weights(folder: Path) -> tuple[Weights, Path]:
    file = folder / "diffusion_pytorch_model.safetensors"
    if file.is_file():
        return load_file(file), file
    file = file.with_suffix(".bin")
    return {name: whole(tensor) for name, tensor in read_tensors(file).items()}, file


def _json(file: Path) -> dict[str, Any]:
    values = json.loads(file.read_bytes())
    if not isinstance(values, dict):
        raise UnpicklingError(f"{file.name} holds no object")
    return values
