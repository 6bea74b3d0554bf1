"""diffusers' UNet2DModel, with noise prediction."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from flowmaps.errors import UserError
from flowmaps.importers.build import Options, Source, attention_weights, check_empty, layer, layers
from flowmaps.importers.inert import REMEDY, Unsupported, same, shown
from flowmaps.importers.torch_files import Weights, plain_names, read_tensors
from flowmaps.networks.layers import u_shape
from flowmaps.reading import parse, read_json, regular_file


@dataclass(frozen=True)
class UNet2DConfig:
    """The arguments of a UNet2DModel, with the class's defaults."""

    block_out_channels: tuple[int, ...]
    down_block_types: tuple[str, ...]
    up_block_types: tuple[str, ...]
    in_channels: int = 3
    out_channels: int = 3
    sample_size: int | tuple[int, int] | None = None
    layers_per_block: int = 2
    dropout: float = 0.0
    num_class_embeds: int | None = None
    center_input_sample: bool = False
    time_embedding_type: str = "positional"
    time_embedding_dim: int | None = None
    mid_block_type: str | None = "UNetMidBlock2D"
    mid_block_scale_factor: float = 1.0
    downsample_type: str = "conv"
    upsample_type: str = "conv"
    act_fn: str = "silu"
    norm_num_groups: int = 32
    attn_norm_num_groups: int | None = None
    resnet_time_scale_shift: str = "default"
    add_attention: bool = True
    class_embed_type: str | None = None
    num_train_timesteps: int | None = None
    norm_eps: float = 1e-5
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    downsample_padding: int = 1
    attention_head_dim: int | None = 8


# Arguments of which only the class's default has a network here.
ALWAYS = (
    *("center_input_sample", "time_embedding_type", "mid_block_type", "mid_block_scale_factor", "downsample_type"),
    *("upsample_type", "act_fn", "norm_num_groups", "attn_norm_num_groups", "resnet_time_scale_shift"),
    *("add_attention", "class_embed_type"),
)
CHOICES = ("norm_eps", "flip_sin_to_cos", "freq_shift", "downsample_padding", "attention_head_dim")
DEFAULTS = (1e-5, True, 0, 1, 8)
KINDS = {DEFAULTS: "diffusers", (1e-6, False, 1, 0, None): "ddpm"}
SCHEDULERS = ("DDPMScheduler", "DDIMScheduler", "PNDMScheduler")
# What makes the noise levels, by the schedulers' defaults, and what concerns sampling with those schedulers alone.
LEVELS = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
    "prediction_type": "epsilon",
    "predict_epsilon": True,
}
SAMPLING = {
    *("variance_type", "clip_sample", "clip_sample_range", "thresholding", "dynamic_thresholding_ratio"),
    *("sample_max_value", "timestep_spacing", "steps_offset", "set_alpha_to_one", "skip_prk_steps"),
}


def diffusers_unet(path: Path, options: Options) -> Source:
    """Read the folder of a ``UNet2DModel``, or of its pipeline: noise prediction at DDPM's times."""
    if not path.is_dir():
        raise UserError("is a file: give the folder with config.json, or that of the pipeline")
    folder = path / "unet" if (path / "unet").is_dir() else path
    config = _config(folder / "config.json")
    for key in ALWAYS:
        if not same(found := getattr(config, key), value := getattr(UNet2DConfig, key)):
            raise Unsupported(f"its {key} is {shown(found)}, and only {shown(value)} has a network here")
    kind = tuple(getattr(config, key) for key in CHOICES)
    if kind not in KINDS:
        raise Unsupported(f"its {', '.join(CHOICES)} are {kind}, and only {' or '.join(map(str, KINDS))} are known")
    predicted = options.settle("prediction", _check_schedule(path, folder), "noise")
    if predicted != "noise":
        raise Unsupported(f"its prediction is {predicted}, and this package reads only noise")
    w, file = _weights(folder)
    widths, each, levels = config.block_out_channels, config.layers_per_block, len(config.block_out_channels)
    sizes = {config.sample_size} if isinstance(config.sample_size, int) else set(config.sample_size or ())
    if len(sizes) > 1:
        raise Unsupported(f"its sample_size is {config.sample_size}, and only squares are known")
    size = options.settle("image_size", next(iter(sizes), None))
    if not 0 < levels * each <= len(w) or any(width < 128 or width % 32 or width % widths[0] for width in widths):
        raise Unsupported(
            f"its block_out_channels are {shown(list(widths))} with {each} layers each, "
            "and 32 groups of at least 4 need multiples of 128"
        )
    types = config.down_block_types
    if set(types) - {"DownBlock2D", "AttnDownBlock2D"} or len(types) != levels:
        raise Unsupported(f"its down_block_types are {types}, and only DownBlock2D and AttnDownBlock2D are known")
    mirrored = tuple(name.replace("Down", "Up") for name in reversed(types))
    if config.up_block_types != mirrored:
        raise Unsupported(f"its up_block_types are {config.up_block_types}, and only {mirrored} are known")
    ours: Weights = {
        **layer("embedding.start.0", w, "time_embedding.linear_1."),
        **layer("embedding.start.2", w, "time_embedding.linear_2."),
        **layer("stem", w, "conv_in."),
        **layer("head.0", w, "conv_norm_out."),
        **layer("head.2", w, "conv_out."),
    }
    if KINDS[kind] == "ddpm":  # sines first
        ours["embedding.start.0.weight"] = torch.roll(ours["embedding.start.0.weight"], widths[0] // 2, dims=1)
    classes = config.num_class_embeds or 0
    if classes:
        table = w.pop("class_embedding.weight")
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
    check_empty(w)
    arguments = {
        "image_size": size,
        "channels": config.in_channels,
        "width": widths[0],
        "channel_mult": tuple(width // widths[0] for width in widths),
        "blocks": each,
        "attention_resolutions": tuple(size >> level for level in range(levels) if types[level] == "AttnDownBlock2D"),
        "dropout": config.dropout,
        "num_classes": classes,
        "data_std": 1.0,
        "variant": KINDS[kind],
        "convention": "ddpm",
        "base_std": 1.0,
    }
    return Source("UNet", arguments, ours, file=file)


def _diffusers_block(w: Weights, place: str, block: str, attention: str) -> Weights:
    names = {name: f"{block}{name}" for name in ("norm1", "conv1", "norm2", "conv2")}
    ours = layers(place, w, names | {"modulation": f"{block}time_emb_proj", "skip": f"{block}conv_shortcut"})
    for q, k, v, out in (
        ("to_q", "to_k", "to_v", "to_out.0"),
        ("query", "key", "value", "proj_attn"),
    ):  # current and former names
        if f"{attention}{q}.weight" in w:
            weight, bias = (
                torch.cat([w.pop(f"{attention}{name}.{key}") for name in (q, k, v)]) for key in ("weight", "bias")
            )
            ours |= layer(f"{place}.attention.norm", w, f"{attention}group_norm.")
            ours |= attention_weights(
                place, weight, bias, w.pop(f"{attention}{out}.weight"), w.pop(f"{attention}{out}.bias")
            )
    return ours


def _config(file: Path) -> UNet2DConfig:
    values = read_json(file, REMEDY)
    if not isinstance(values, dict) or values.get("_class_name", "UNet2DModel") != "UNet2DModel":
        raise UserError(f"{file} does not describe a UNet2DModel: {REMEDY}")
    return parse(UNet2DConfig, {key: value for key, value in values.items() if key[:1] != "_"}, str(file))


def _check_schedule(path: Path, folder: Path) -> str | None:
    """Check the schedulers that lie with a model; return what it predicts, None if there is none."""
    places = [path, path / "scheduler", folder, *([path.parent / "scheduler"] if path.name == "unet" else [])]
    files = [file for place in dict.fromkeys(places) if (file := place / "scheduler_config.json").exists()]
    for file in files:
        values = read_json(file, REMEDY)
        if not isinstance(values, dict):
            raise UserError(f"{file} does not describe a scheduler: {REMEDY}")
        if (name := values.get("_class_name", SCHEDULERS[0])) not in SCHEDULERS:
            raise Unsupported(f"its scheduler is a {shown(name)}, and only {', '.join(SCHEDULERS)} are known")
        for key, found in values.items():
            if key[:1] == "_" or key in SAMPLING:
                continue
            if key not in LEVELS or not same(found, LEVELS[key]):
                known = f"and only {shown(LEVELS[key])} is known" if key in LEVELS else "which is unknown here"
                raise Unsupported(f"its scheduler's {shown(key)[1:-1]} is {shown(found)}, {known}")
    return "noise" if files else None


def _weights(folder: Path) -> tuple[Weights, Path]:
    file = folder / "diffusion_pytorch_model.safetensors"
    if file.exists():
        return plain_names(load_file(regular_file(file, REMEDY))), file
    file = file.with_suffix(".bin")
    return plain_names(read_tensors(file)), file
