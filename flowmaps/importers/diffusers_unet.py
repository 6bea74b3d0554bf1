"""diffusers' UNet2DModel."""

from dataclasses import dataclass
from pathlib import Path

import torch

from flowmaps.importers.build import Options, Source, attention_weights, check_empty, layer, layers
from flowmaps.importers.diffusers_folder import check_defaults, find_folder, read_config, read_convention, read_weights
from flowmaps.importers.inert import Unsupported, shown
from flowmaps.importers.torch_files import Weights
from flowmaps.networks.layers import u_shape
from flowmaps.networks.unet import VARIANTS


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
    *("upsample_type", "act_fn", "attn_norm_num_groups", "resnet_time_scale_shift"),
    *("add_attention", "class_embed_type"),
)
CHOICES = ("norm_eps", "freq_shift", "downsample_padding")
KINDS = {(1e-5, 0, 1): "diffusers", (1e-6, 1, 0): "ddpm"}


def diffusers_unet(path: Path, options: Options) -> Source:
    """Read the folder of a ``UNet2DModel``, or of its pipeline, with the schedule and prediction of its scheduler."""
    folder = find_folder(path, "unet")
    config = read_config(folder / "config.json", ("UNet2DModel",), UNet2DConfig)
    check_defaults(config, ALWAYS)
    kind = tuple(getattr(config, key) for key in CHOICES)
    if kind not in KINDS:
        raise Unsupported(f"its {', '.join(CHOICES)} are {kind}, and only {' or '.join(map(str, KINDS))} are known")
    convention = read_convention(path, folder, options)
    w, files = read_weights(folder, "conv_in.weight")
    widths, each, levels = config.block_out_channels, config.layers_per_block, len(config.block_out_channels)
    sizes = {config.sample_size} if isinstance(config.sample_size, int) else set(config.sample_size or ())
    if len(sizes) > 1:
        raise Unsupported(f"its sample_size is {config.sample_size}, and only squares are known")
    size = options.settle("image_size", next(iter(sizes), None))
    if not 0 < levels * each <= len(w) or min(widths) < 1:
        raise Unsupported(f"its block_out_channels are {shown(list(widths))} with {each} layers each")
    if uneven := [width for width in widths if width % widths[0]]:
        raise Unsupported(
            f"its block_out_channels have {uneven[0]}, and only multiples of the first have a network here"
        )
    groups, heads = config.norm_num_groups, config.attention_head_dim
    if groups < 1 or widths[0] % groups or (heads is not None and heads < 1):
        raise Unsupported(f"its norm_num_groups, {groups}, or attention_head_dim, {heads}, do not fit its channels")
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
    if not config.flip_sin_to_cos:  # sines first
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
        "convention": convention,
        "base_std": 1.0,
        # 32 groups are the usual ones from 128 channels on
        "norm_groups": 0 if groups == 32 and widths[0] >= 128 else groups,
        "head_channels": 0 if heads == VARIANTS[KINDS[kind]].head_channels else heads or max(widths),
    }
    return Source("UNet", arguments, ours, files=files)


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
